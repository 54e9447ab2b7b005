"""How far masks agree: between localizers (overlap matrix), and of one with itself (stability).

Overlap of two sets of neurons is |A and B| / min(|A|, |B|), beside what two random sets of these sizes share;
Jaccard's |A and B| / |A or B| where that is wanted. A localizer whose masks change with the seed, the wording or a
few facts more or less has not found a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.model import Model
from locus.progress import track
from locus.scores import NeuronScores
from tracing.neuron_gradients import Examples

Measure = Literal["overlap", "jaccard"]
Chosen = Bool[Tensor, "layer neuron"]


@runtime_checkable
class NeuronLocalizer(Protocol):
    """What `stability` runs again and again."""

    def run(self, model: Model, facts: Examples, retain: Examples | None = None) -> NeuronScores:
        """Scores of every neuron."""
        ...


@dataclass(frozen=True)
class Stability:
    """Agreement of one localizer's masks over repetitions."""

    pairs: Float[Tensor, " pair"]
    """Overlap of every two repetitions' masks."""
    low: float
    """2.5 % quantile of the mean over resampled repetitions."""
    high: float
    """97.5 % quantile."""
    chance: float
    """Overlap expected of random masks of that size."""

    @property
    def mean(self) -> float:
        """Mean overlap of two repetitions."""
        return float(self.pairs.mean())


def overlap(a: Chosen, b: Chosen, measure: Measure = "overlap") -> float:
    """Agreement of two sets of neurons, 0 to 1; 1 of two empty sets."""
    both, either = int((a & b).sum()), int((a | b).sum())
    least = min(int(a.sum()), int(b.sum()))
    whole = least if measure == "overlap" else either
    return both / whole if whole else float(either == 0)


def overlap_matrix(
    scores: Sequence[NeuronScores],
    budget: float | int | str = "1%",
    *,
    per_layer: bool = False,
    measure: Measure = "overlap",
) -> Float[Tensor, "method method"]:
    """Agreement of every two localizers' masks at a budget.

    Raises:
        InputError: a budget out of range.
    """
    chosen = [one.choose(budget, per_layer=per_layer) for one in scores]
    matrix = torch.eye(len(chosen))
    for i, j in combinations(range(len(chosen)), 2):
        matrix[i, j] = matrix[j, i] = overlap(chosen[i], chosen[j], measure)
    return matrix


def stability_of(
    chosen: Sequence[Chosen], *, measure: Measure = "overlap", draws: int = 2000, seed: int = 0
) -> Stability:
    """Mean pairwise agreement of repetitions' masks, with a bootstrap interval over the repetitions.

    A resampling draws repetitions with replacement; pairs of a repetition with itself do not count.

    Raises:
        InputError: fewer than two repetitions.
    """
    n = len(chosen)
    if n < 2:
        raise InputError(f"stability of {n} repetition: give at least 2")
    matrix = torch.zeros(n, n)
    for i, j in combinations(range(n), 2):
        matrix[i, j] = matrix[j, i] = overlap(chosen[i], chosen[j], measure)
    pairs = torch.stack([matrix[i, j] for i, j in combinations(range(n), 2)])
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(draws):
        index = torch.randint(n, (n,), generator=generator)
        different = index[:, None] != index[None, :]
        if bool(different.any()):
            means.append(matrix[index][:, index][different].mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975])).tolist()
    size, total = float(torch.stack([one.sum() for one in chosen]).float().mean()), chosen[0].numel()
    share = size / total
    return Stability(pairs, low, high, share if measure == "overlap" else share / (2 - share))


def stability(
    localizer: NeuronLocalizer,
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None = None,
    *,
    over: Literal["paraphrases", "facts"] = "paraphrases",
    budget: float | int | str = "1%",
    repetitions: int = 5,
    seed: int = 0,
) -> Stability:
    """Run a localizer several times on what should make no difference.

    Args:
        localizer: Gives neuron scores.
        model: Left as it is.
        facts: The facts.
        retain: Handed on.
        over: "paraphrases": the facts in their own words, then in the first, second, ... paraphrase of each;
            "facts": random halves of the facts.
        budget: Of each mask.
        repetitions: How many halves; for paraphrases at most as many as all facts have, and one.
        seed: Of the halves. For a localizer's own seed, use `stability_of` on masks made with several.

    Raises:
        InputError: facts without paraphrases, or too few for halves.
    """
    if over == "paraphrases":
        n_wordings = min(repetitions, 1 + min((len(fact.paraphrases) for fact in facts), default=0))
        wordings = [[_wording(fact, i) for fact in facts] for i in range(n_wordings)]
    else:
        wordings = _halves(facts, repetitions, seed)
    chosen = [localizer.run(model, words, retain).choose(budget) for words in track(wordings, "stability")]
    return stability_of(chosen)


def _wording(fact: Fact, index: int) -> Example:
    return fact.example if index == 0 else fact.paraphrase_examples[index - 1]


def _halves(facts: Sequence[Fact], repetitions: int, seed: int) -> list[list[Example]]:
    if len(facts) < 2:
        raise InputError(f"{len(facts)} fact cannot be halved: give at least 2")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(facts), generator=generator).tolist() for _ in range(repetitions)]
    return [[facts[i].example for i in order[: len(facts) // 2]] for order in orders]
