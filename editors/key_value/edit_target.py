"""The edit target: what the model should say instead, and how the value that makes it say so is searched for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from locus.errors import InputError
from locus.fact import Fact

SENTENCE = 8
"""Targets of more tokens are sentences: judged by the token, for as a whole they are improbable, known or not."""
To = Literal["refusal", "entropy", "alternatives", "rewrite"]


@dataclass(frozen=True)
class EditTarget:
    """What the model should say instead, and how the value that makes it say so is searched for."""

    to: To = "refusal"
    """refusal: a fixed answer; entropy: the uniform distribution at the target's tokens; alternatives: the fact's
    wrong targets and, where these are fewer than three, answers of other facts, of its relation if there are such,
    their first tokens all with the same probability (a fact for which none is found: what the model itself finds most
    probable instead); rewrite: `answer`, or the first wrong target (CounterFact's
    target_new)."""
    refusal: str = " unknown"
    """The fixed answer, with its leading space."""
    answer: str = ""
    """What a rewrite is to, with its leading space, for every fact; "" for each fact's own."""
    prefixes: int = 2
    """Random context prefixes; the prompt without one is always used too."""
    steps: int = 25
    """Steps of Adam, at most."""
    lr: float = 0.35
    """Its learning rate, in units of the root mean square of the value it starts from."""
    loss_stop: float = 0.05
    """Loss stop: a fact whose loss, in nats per token, is below this is left as it is."""
    prob_stop: float = 0.005
    """Target-probability stop: unless it is rewritten, so is a fact whose target begins with a probability below this,
    mean over the context prefixes. Going further costs other facts more than it hides; 0 goes on to `loss_stop`."""
    sentence_stop: float = 0.5
    """The same stop for a target of more than eight tokens, which one improbable token makes improbable as a whole: its
    probability per token, as a share of what it was before the search. 0 goes on to `loss_stop`."""
    kl: float = 0.0625
    """Weight of KL(before || after) of what follows "{subject} is a"."""
    decay: float = 0.5
    """Weight of the value delta's norm over the squared norm of the value it starts from."""
    clamp: float = 4.0
    """Longest value delta, in units of the norm of the value it starts from."""

    def __post_init__(self) -> None:
        if self.to not in get_args(To):
            raise InputError(f"to = {self.to!r}: not one of {', '.join(get_args(To))}")
        if self.to == "refusal" and not self.refusal.strip():
            raise InputError("the refusal is empty: say what the model should answer")
        for name in ("steps", "lr", "clamp"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} = {getattr(self, name)}: must be positive")
        for name in ("kl", "decay", "loss_stop", "prob_stop", "sentence_stop", "prefixes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} = {getattr(self, name)}: must not be negative")

    def rewriting_to(self, answer: str) -> EditTarget:
        """The same search for a rewrite to `answer`, with its leading space."""
        return replace(self, to="rewrite", answer=answer)


def judged_per_token(n_tokens: int) -> bool:
    """Whether a target of so many tokens is judged by the token."""
    return n_tokens > SENTENCE


def answers(fact: Fact, target: EditTarget) -> tuple[str, ...]:
    """The texts that the edit target is measured on, after a fact's prompt.

    What the model should say; or, for the entropy target, what it says now.

    Raises:
        InputError: the fact has no alternatives and the edit target needs them.
    """
    if target.to == "refusal":
        return (target.refusal,)
    if target.to == "entropy":
        return (fact.target,)
    if target.to == "rewrite" and target.answer:
        return (target.answer,)
    if not fact.alternatives:
        raise InputError(
            f"{fact.source or f'fact {fact.id!r}'}: has no alternatives, which the edit target {target.to!r} needs: "
            "add some, or use --target-to refusal"
        )
    return (fact.target,) if target.to == "alternatives" else fact.alternatives[:1]
