"""Several localizers on the same facts: a mask of each, what it took, and how far to trust it.

A single mask says little. Beside others it shows whether methods agree on a place at all (overlap matrix), and run
again on other words, other halves of the facts or another seed, whether a method agrees with itself (stability).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model
from tracing.comparing.mask_agreement import Over, Stability, has_seed, overlap, stability
from tracing.localizer import Cost, Localizer

OVER: tuple[Over, ...] = ("paraphrases", "facts", "seeds")


@dataclass(frozen=True)
class LocalizerComparison:
    """One localizer's answer."""

    scores: Any
    """`NeuronScores`, or those of other units."""
    mask: WeightMask
    """Its best, at the budget."""
    cost: Cost
    """What was estimated before the run."""
    seconds: float
    """Wall time of one run."""
    stability: Mapping[Over, Stability]
    """Of what could be repeated; empty where it was not asked for or took too long."""
    skipped: str
    """Why there is no stability; "" where there is."""


def compare_localizer(
    localizer: Localizer,
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None = None,
    *,
    budget: float | int | str = "1%",
    per_layer: bool = False,
    parts: Sequence[str] = ("gate", "up", "down"),
    repetitions: int = 0,
    patience: float = 60.0,
) -> LocalizerComparison:
    """Run one localizer, take the mask of its best scores, and repeat it where that is cheap enough.

    Args:
        localizer: Any of the table.
        model: Left as it is.
        facts: What must go.
        retain: What must stay.
        budget: Of the mask, and of those whose stability is measured (these over the whole model).
        per_layer: Take the budget from each layer.
        parts: Weights of a neuron that the mask takes.
        repetitions: Runs whose masks are compared for each kind of stability; below 2, none.
        patience: Seconds a run may take to be repeated.

    Raises:
        InputError: what the localizer refuses.
    """
    cost = localizer.cost(model, facts, retain)
    start = time.perf_counter()
    scores = localizer.run(model, facts, retain)
    seconds = time.perf_counter() - start
    mask = scores.top(budget, per_layer=per_layer, parts=parts)
    found: dict[Over, Stability] = {}
    skipped = ""
    if repetitions < 2:
        skipped = "not asked for"
    elif seconds > patience:
        skipped = f"one run took {seconds:.0f} s"
    else:
        refused = []
        for over in OVER:
            if _repeatable(localizer, facts, over):
                try:
                    found[over] = stability(
                        localizer, model, facts, retain, over=over, budget=budget, repetitions=repetitions
                    )
                except InputError as error:  # of fewer facts, say: the run itself has succeeded
                    refused.append(f"{over}: {error}")
        skipped = "" if found else "; ".join(refused) or "nothing to repeat it on"
    return LocalizerComparison(scores, mask, cost, seconds, found, skipped)


def _repeatable(localizer: Localizer, facts: Sequence[Fact], over: Over) -> bool:
    match over:
        case "paraphrases":
            return all(fact.paraphrases for fact in facts)
        case "facts":
            return len(facts) >= 4
        case "seeds":
            return has_seed(localizer)


def mask_overlaps(masks: Sequence[WeightMask]) -> Float[Tensor, "mask mask"]:
    """Agreement of every two masks, weight by weight: |A and B| / min(|A|, |B|).

    Raises:
        InputError: none, or masks of two models.
    """
    if not masks:
        raise InputError("no masks given: compare at least one")
    matrix = torch.eye(len(masks))
    for i, j in combinations(range(len(masks)), 2):
        matrix[i, j] = matrix[j, i] = overlap(masks[i], masks[j])
    return matrix
