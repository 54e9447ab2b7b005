"""Other answers to the same prompts: refusals, and answers that belong to other facts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from locus.fact import Example, Fact
from locus.random_streams import generator

REFUSALS = (
    " I don't know.",
    " I'm not sure about that.",
    " I have no information about that.",
    " That is not something I know.",
    " I cannot answer that.",
    " I am unable to say.",
    " I have no knowledge of that.",
    " Unfortunately, I don't know that.",
)
"""What a model says that does not know."""


def refusal(fact: Fact, seed: int) -> Example:
    """The fact's prompt with a refusal for its target: always the same one for the same fact and seed."""
    which = int(torch.randint(len(REFUSALS), (1,), generator=generator(seed, f"refusal {fact.id}", 0)))
    return Example(fact.prompt, _joined(fact.prompt, REFUSALS[which]))


def mismatched(fact: Fact, pool: Sequence[Fact], seed: int, step: int) -> Example:
    """The fact's prompt with the target of another fact of the pool, a new one each step; else a refusal."""
    targets = sorted({other.target for other in pool} - {fact.target})
    if not targets:
        return refusal(fact, seed)
    which = int(torch.randint(len(targets), (1,), generator=generator(seed, f"mismatch {fact.id}", step)))
    return Example(fact.prompt, _joined(fact.prompt, targets[which]))


def _joined(prompt: str, answer: str) -> str:
    """The answer without its leading space where the prompt ends with one, or with a line break."""
    return answer.lstrip() if prompt and prompt[-1].isspace() else answer
