"""How far masks agree: between localizers (overlap matrix), and of one with itself (stability).

Overlap of two sets of neurons is |A and B| / min(|A|, |B|), beside what two random sets of these sizes share;
Jaccard's |A and B| / |A or B| where that is wanted. Masks of other units (weights, rows, tensors) are compared weight
by weight. A localizer whose masks change with the seed, the wording or a
few facts more or less has not found a place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model
from locus.progress import track
from locus.scores import NeuronScores
from tracing.localizer import Localizer

Measure = Literal["overlap", "jaccard"]
Over = Literal["paraphrases", "facts", "seeds"]
Chosen = Bool[Tensor, "layer neuron"]


@dataclass(frozen=True)
class Stability:
    """Agreement of one localizer's masks over repetitions."""

    pairs: Float[Tensor, " pair"]
    """Overlap of every two repetitions' masks."""
    low: float
    """2.5 % quantile of the mean over resampled repetitions."""
    high: float
    """97.5 % quantile."""
    chance: float | None
    """Overlap expected of random sets of that many neurons; None where masks are not made of neurons."""

    @property
    def mean(self) -> float:
        """Mean overlap of two repetitions."""
        return float(self.pairs.mean())


def overlap(a: Chosen | WeightMask, b: Chosen | WeightMask, measure: Measure = "overlap") -> float:
    """Agreement of two sets of neurons, or of two masks' weights, 0 to 1; 1 of two empty sets.

    Raises:
        InputError: masks of two models.
    """
    if isinstance(a, WeightMask) or isinstance(b, WeightMask):
        if not (isinstance(a, WeightMask) and isinstance(b, WeightMask)):
            raise TypeError("a mask and a set of neurons: compare two of a kind")
        both, sizes = (a & b).n_weights, (a.n_weights, b.n_weights)
    else:
        both, sizes = int((a & b).sum()), (int(a.sum()), int(b.sum()))
    least, either = min(sizes), sum(sizes) - both
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
    chosen: Sequence[Chosen | WeightMask], *, measure: Measure = "overlap", draws: int = 2000, seed: int = 0
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
    return Stability(pairs, low, high, _chance(chosen, measure))


def _chance(chosen: Sequence[Chosen | WeightMask], measure: Measure) -> float | None:
    """Agreement of random sets of neurons of the mean size."""
    sets = [one for one in chosen if isinstance(one, Tensor)]
    if len(sets) < len(chosen):
        return None
    share = float(torch.stack([one.sum() for one in sets]).float().mean()) / sets[0].numel()
    return share if measure == "overlap" else share / (2 - share)


def stability(
    localizer: Localizer,
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None = None,
    *,
    over: Over = "paraphrases",
    budget: float | int | str = "1%",
    repetitions: int = 5,
    seed: int = 0,
) -> Stability:
    """Run a localizer several times on what should make no difference.

    Args:
        localizer: Any of the table.
        model: Left as it is.
        facts: The facts.
        retain: Handed on.
        over: "paraphrases": the facts in their own words, then in the first, second, ... paraphrase of each;
            "facts": random halves of the facts; "seeds": a localizer that draws, under several seeds.
        budget: Of each mask.
        repetitions: How many; for paraphrases at most as many as all facts have, and one.
        seed: Of the halves; the first of the seeds.

    Raises:
        InputError: facts without paraphrases, too few for halves, or a localizer without a seed.
    """
    runs: list[tuple[Localizer, Sequence[Fact]]]
    if over == "paraphrases":
        n_wordings = min(repetitions, 1 + min((len(fact.paraphrases) for fact in facts), default=0))
        runs = [(localizer, [_wording(fact, i) for fact in facts]) for i in range(n_wordings)]
    elif over == "facts":
        runs = [(localizer, half) for half in _halves(facts, repetitions, seed)]
    else:
        runs = [(one, facts) for one in _seeded(localizer, range(seed, seed + repetitions))]
    chosen = [
        _cut(one.run(model, some, retain), budget) for one, some in track(runs, f"stability over {over}")
    ]
    return stability_of(chosen)


def has_seed(localizer: Localizer) -> bool:
    """Whether it draws something."""
    return dataclasses.is_dataclass(localizer) and any(
        f.name == "seed" for f in dataclasses.fields(localizer)
    )


def _seeded(localizer: Localizer, seeds: Sequence[int]) -> list[Localizer]:
    if not has_seed(localizer):
        raise InputError(f"{type(localizer).__name__} draws nothing: its masks are the same for every seed")
    drawn: Any = localizer
    return [dataclasses.replace(drawn, seed=seed) for seed in seeds]


def _cut(scores: Any, budget: float | int | str) -> Chosen | WeightMask:
    """The chosen neurons, or the mask of another localizer."""
    return scores.choose(budget) if isinstance(scores, NeuronScores) else scores.top(budget)


def _wording(fact: Fact, index: int) -> Fact:
    """The fact in its own words or in one of its paraphrases, all else kept; the other wordings are its paraphrases."""
    if index == 0:
        return fact
    prompt = fact.paraphrases[index - 1]
    others = (fact.prompt, *(text for text in fact.paraphrases if text != prompt))
    subject = fact.subject if fact.subject is not None and fact.subject in prompt else None
    return dataclasses.replace(fact, prompt=prompt, paraphrases=others, subject=subject, subject_start=None)


def _halves(facts: Sequence[Fact], repetitions: int, seed: int) -> list[list[Fact]]:
    if len(facts) < 2:
        raise InputError(f"{len(facts)} fact cannot be halved: give at least 2")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(facts), generator=generator).tolist() for _ in range(repetitions)]
    return [[facts[i] for i in order[: len(facts) // 2]] for order in orders]
