"""The edit target: what the model should say instead, and the value v* that makes it say so.

The value delta v* − v, added to one module's output at one position, is found by gradient descent while all weights
stay as they are (Meng et al. 2022, arXiv:2202.05262, section 3.1); the least-squares editors then write it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from editors.key_value.key_positions import KeyRow, Place, row, states, with_prefix
from editors.key_value.prefix import SuffixForwards, delta_forwards
from locus import progress
from locus.errors import InputError
from locus.fact import Fact
from locus.metrics import kl_divergence, token_nll
from locus.model import Model
from locus.tokens import encode

MOST_KEPT = 2**30
"""Bytes of keys and values that are kept at most, unless one fact alone has more."""
To = Literal["refusal", "entropy", "alternatives", "rewrite"]


@dataclass(frozen=True)
class EditTarget:
    """What the model should say instead, and how the value that makes it say so is searched for."""

    to: To = "refusal"
    """refusal: a fixed answer; entropy: the uniform distribution at the target's tokens; alternatives: the fact's
    wrong targets and, where these are fewer than three, answers of other facts, of its relation if there are such,
    their first tokens all with the same probability; rewrite: `answer`, or the first wrong target (CounterFact's
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
        for name in ("kl", "decay", "loss_stop", "prob_stop", "prefixes"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} = {getattr(self, name)}: must not be negative")

    def rewriting_to(self, answer: str) -> EditTarget:
        """The same search for a rewrite to `answer`, with its leading space."""
        return replace(self, to="rewrite", answer=answer)


@dataclass(frozen=True, eq=False)
class ValueDeltas:
    """The value deltas v* − v found for some facts."""

    delta: Float[Tensor, "fact d_model"]
    """What to add to the module's output at the fact's position; float64."""
    start: Float[Tensor, "fact d_model"]
    """The output in the plain prompt, before the delta is added; float64."""
    loss: Float[Tensor, " fact"]
    """Loss of the edit target when it was last measured, before the last step, in nats per token."""
    prob: Float[Tensor, " fact"]
    """Probability of the target's first token then, mean over the context prefixes."""
    steps: int
    """Steps taken by the slowest fact."""
    from_prefix: bool
    """Whether forwards could begin at the prefix's recorded keys and values; else each was run whole: slower."""


def find_value_deltas(
    model: Model,
    facts: Sequence[Fact],
    target: EditTarget,
    site: str,
    prefixes: Sequence[str],
    place: Place = "subject",
    batch_tokens: int = 4096,
) -> ValueDeltas:
    """What to add to the output of the module `site` at each fact's position for the model to answer as wanted.

    The facts are searched for side by side and do not see each other: with an element-wise optimizer that is the
    same as one after the other.

    Raises:
        InputError: a fact without what the edit target needs (alternatives, a subject), or one that cannot be encoded.
    """
    portions = _portions(model, _answers(model, facts, target, prefixes, place), len(facts))
    with progress.task("values", total=target.steps * len(portions)) as line:
        found = [
            _found(model, facts[at], target, site, prefixes, place, batch_tokens, line) for at in portions
        ]
    return ValueDeltas(
        torch.cat([one.delta for one in found]),
        torch.cat([one.start for one in found]),
        torch.cat([one.loss for one in found]),
        torch.cat([one.prob for one in found]),
        max(one.steps for one in found),
        all(one.from_prefix for one in found),
    )


def _portions(model: Model, rows: Sequence[KeyRow], n_facts: int) -> list[slice]:
    """Facts in order, as many at a time as leave no more than MOST_KEPT bytes of keys and values to be kept."""
    atlas = model.atlas
    a_token = 2 * atlas.n_layers * atlas.n_kv_heads * atlas.d_head * model.dtype.itemsize
    sizes = [0] * n_facts
    for one in rows:
        sizes[one.fact] += one.position * a_token
    found, start, held = [], 0, 0
    for fact, size in enumerate(sizes):
        if fact > start and held + size > MOST_KEPT:
            found.append(slice(start, fact))
            start, held = fact, 0
        held += size
    return [*found, slice(start, n_facts)]


def _found(
    model: Model,
    facts: Sequence[Fact],
    target: EditTarget,
    site: str,
    prefixes: Sequence[str],
    place: Place,
    batch_tokens: int,
    line: progress.Task,
) -> ValueDeltas:
    """The value deltas of a portion of the facts."""
    wanted = _answers(model, facts, target, prefixes, place)
    targets = torch.tensor([encode(model, fact).target_ids[0] for fact in facts])
    plain = [row(model, fact, i, place) for i, fact in enumerate(facts)]
    start = states(model, plain, outputs=[site], batch_tokens=batch_tokens)[1][site]
    guesses = _Guesses.of(model, facts) if target.to == "alternatives" else None
    search = _Search(
        model,
        site,
        wanted,
        _essence_prompts(model, facts, target, place),
        target,
        start,
        targets,
        batch_tokens,
        guesses,
    )
    for _ in range(target.steps):
        if not search.step():
            break
        line.advance(note=f"loss {float(search.loss.mean()):.2f}")
    from_prefix = isinstance(search.forwards, SuffixForwards)
    return ValueDeltas(
        search.delta.detach().double().cpu(), start, search.loss, search.prob, search.steps, from_prefix
    )


@dataclass(frozen=True, eq=False)
class _Guesses:
    """The first tokens of each fact's wrong answers; unused places have no weight."""

    ids: Int64[Tensor, "fact guess"]
    weights: Float[Tensor, "fact guess"]
    """The probability each is to have."""

    @classmethod
    def of(cls, model: Model, facts: Sequence[Fact]) -> _Guesses:
        """Of all facts.

        Raises:
            InputError: a fact whose wrong answers all begin as the right one does.
        """
        found = []
        for fact in facts:
            right = encode(model, fact).target_ids[0]
            said = [encode(model, replace(fact, target=wrong)).target_ids[0] for wrong in fact.alternatives]
            ids = [one for one in dict.fromkeys(said) if one != right]
            if not ids:
                raise InputError(
                    f"{fact.source or f'fact {fact.id!r}'}: every alternative begins with the token that the target "
                    "begins with: add another, or use --target-to refusal"
                )
            found.append(ids)
        most = max(map(len, found))
        return cls(
            torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in found]),
            torch.tensor([[1 / len(ids)] * len(ids) + [0.0] * (most - len(ids)) for ids in found]),
        )

    def divergence(
        self, logits: Float[Tensor, "label d_vocab"], owner: Int64[Tensor, " label"]
    ) -> Float[Tensor, " label"]:
        """KL(guesses || edited) of each label, in nats."""
        ids, weights = self.ids[owner].to(logits.device), self.weights[owner].to(logits)
        return (torch.xlogy(weights, weights) - weights * logits.log_softmax(-1).gather(-1, ids)).sum(-1)


class _Search:
    """Adam on the value deltas of all facts that are not there yet."""

    def __init__(
        self,
        model: Model,
        site: str,
        wanted: Sequence[KeyRow],
        essence: Sequence[KeyRow],
        target: EditTarget,
        start: Float[Tensor, "fact d_model"],
        targets: Int64[Tensor, " fact"],
        batch_tokens: int,
        guesses: _Guesses | None,
    ) -> None:
        self.target, self.guesses, self.targets = target, guesses, targets
        self.n_wanted = len(wanted)
        rows = [*wanted, *essence]
        self.owner = torch.tensor([one.fact for one in rows])
        self.forwards = delta_forwards(model, site, rows, batch_tokens)
        self.n_rows = torch.bincount(self.owner[: self.n_wanted], minlength=len(start))
        self.norm = start.norm(dim=1).clamp_min(1e-12)
        self.unit = (self.norm / start.shape[1] ** 0.5)[:, None]  # the delta is kept in these units
        self.raw = torch.zeros(start.shape, dtype=torch.float32, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.raw], lr=target.lr)
        self.loss = torch.full((len(start),), math.inf)
        self.prob = torch.ones(len(start))
        self.active = torch.ones(len(start), dtype=torch.bool)
        self.steps = 0
        self.before = self._unheld()

    @property
    def delta(self) -> Float[Tensor, "fact d_model"]:
        scaled: Tensor = self.raw * self.unit
        return scaled

    def step(self) -> bool:
        """One step of the facts that are not there yet; False when none is left."""
        delta = self.delta.detach().requires_grad_()  # a leaf, so that each batch may be done with at once
        self._look(delta)
        self.active &= self.loss > self.target.loss_stop
        if self.target.to != "rewrite":
            self.active &= self.prob > self.target.prob_stop
        if not bool(self.active.any()):
            return False
        assert delta.grad is not None
        held = self.raw.detach().clone()
        with torch.no_grad():
            self.raw.grad = (delta.grad * self.unit).to(self.raw)
            length = held.norm(dim=1, keepdim=True).clamp_min(1e-12)
            unit, norm = self.unit.to(held), self.norm.to(held)[:, None]
            # d/d raw of decay * ||delta|| / ||start||^2
            self.raw.grad += self.target.decay * unit / norm**2 * held / length * (held.norm() > 0)
        self.optimizer.step()
        with torch.no_grad():
            length = self.delta.norm(dim=1)
            most = (self.target.clamp * self.norm / length.clamp_min(1e-12)).clamp_max(1.0)
            self.raw.mul_(most[:, None].to(self.raw))
            self.raw[~self.active] = held[~self.active]
        self.steps += 1
        return True

    @torch.enable_grad()
    def _look(self, delta: Float[Tensor, "fact d_model"]) -> None:
        """Loss of every fact still active, and the gradient of all that is minimized but for the delta's length."""
        loss, prob = (torch.zeros(len(self.loss), dtype=torch.float64) for _ in range(2))
        due = self.active[self.owner].nonzero().flatten().tolist()
        for batch, logits in self.forwards(due, delta):
            wanted = batch.example < self.n_wanted
            held = self._held(logits[~wanted], batch.example[~wanted])
            logits, owner = logits[wanted], self.owner[batch.example[wanted]]
            first = _firsts(batch.example[wanted])
            terms = self._terms(logits, batch.labels[wanted], batch.example[wanted], owner)
            terms = terms / self.n_rows[owner].to(logits.device)
            (terms.sum() + held.sum()).backward()
            loss.index_add_(0, owner, terms.detach().double().cpu())
            probs = logits.detach().softmax(-1)[first, self.targets[owner[first]]]
            prob.index_add_(0, owner[first], probs.double().cpu() / self.n_rows[owner[first]])
        self.loss = torch.where(self.active, loss.float(), self.loss)
        self.prob = torch.where(self.active, prob.float(), self.prob)

    def _terms(
        self,
        logits: Float[Tensor, "label d_vocab"],
        labels: Int64[Tensor, " label"],
        example: Int64[Tensor, " label"],
        owner: Int64[Tensor, " label"],
    ) -> Float[Tensor, " label"]:
        """Each label's share of its row's loss; of guesses, which are first tokens, only the first label has one."""
        if self.guesses is not None:
            return self.guesses.divergence(logits, owner) * _firsts(example).to(logits)
        n_labels = torch.bincount(example)[example].to(logits.device)
        if self.target.to == "entropy":
            logprob = logits.log_softmax(-1)
            return ((logprob.exp() * logprob).sum(-1) + math.log(logits.shape[-1])) / n_labels
        return token_nll(logits, labels) / n_labels

    @torch.no_grad()
    def _unheld(self) -> dict[int, Float[Tensor, " d_vocab"]]:
        """Log-probabilities of what follows "{subject} is a", by row, before any delta is added."""
        found: dict[int, Tensor] = {}
        essence = range(self.n_wanted, len(self.owner))
        for batch, logits in self.forwards(essence, self.delta.detach()):
            first = _firsts(batch.example)
            found |= dict(zip(batch.example[first].tolist(), logits[first].log_softmax(-1), strict=True))
        return found

    def _held(
        self, logits: Float[Tensor, "label d_vocab"], example: Int64[Tensor, " label"]
    ) -> Float[Tensor, " label"]:
        """KL of what follows "{subject} is a" from before, by label, weighted; only the first label has one."""
        first = _firsts(example)
        logits, rows = logits[first], example[first].tolist()
        if not rows:
            return logits.sum(-1)
        before = torch.stack([self.before[i] for i in rows])
        return self.target.kl * kl_divergence(before, logits)


def _firsts(example: Int64[Tensor, " label"]) -> Bool[Tensor, " label"]:
    """Which labels are their rows' first; a row's labels stand together."""
    first = torch.ones(len(example), dtype=torch.bool)
    first[1:] = example[1:] != example[:-1]
    return first


def _answers(
    model: Model, facts: Sequence[Fact], target: EditTarget, prefixes: Sequence[str], place: Place
) -> list[KeyRow]:
    """Each fact after every context prefix, with each of the answers wanted."""
    found = []
    for number, fact in enumerate(facts):
        for prefix in ("", *prefixes):
            for answer in answers(fact, target):
                found.append(row(model, with_prefix(replace(fact, target=answer), prefix), number, place))
    return found


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


def _essence_prompts(model: Model, facts: Sequence[Fact], target: EditTarget, place: Place) -> list[KeyRow]:
    """ "{subject} is a", which must go on as before; facts without a subject have none."""
    if not target.kl:
        return []
    found = []
    for number, fact in enumerate(facts):
        if fact.subject is not None and place == "subject":
            said = Fact(id="essence", prompt=f"{fact.subject} is a", target=" thing", subject=fact.subject)
            found.append(row(model, replace(said, subject_start=0), number, "subject"))
    return found
