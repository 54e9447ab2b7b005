"""Algebra of neuron scores: from several localizers, or several sets of facts, to one.

All functions take and give `NeuronScores` of one model, so that their results are turned into masks, saved and combined
like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.scores import NeuronScores

Scale = Literal["rank", "z", "robust-z", "max"]
SCALES: tuple[Scale, ...] = ("rank", "z", "robust-z", "max")


def normalize(scores: NeuronScores, how: Scale = "rank", *, per_layer: bool = False) -> NeuronScores:
    """Bring scores to a common scale; their order stays (within each layer, if per layer).

    Args:
        scores: Any.
        how: "rank": 0 for the lowest to 1 for the highest, ties at their mean; "z": mean 0, standard deviation 1;
            "robust-z": median 0, 1.4826 median absolute deviations 1; "max": divided by the largest absolute
            value.
        per_layer: Scale each layer by itself instead of the whole model.
    """
    values = scores.values.double()
    rows = values if per_layer else values.reshape(1, -1)
    match how:
        case "rank":
            scaled = torch.stack([_ranks(row) for row in rows])
        case "z":
            spread = rows.std(1, unbiased=False, keepdim=True)
            scaled = (rows - rows.mean(1, keepdim=True)) / spread.clamp(min=1e-300)
        case "robust-z":
            centred = rows - rows.median(1, keepdim=True).values
            scaled = centred / robust_spread(centred)
        case "max":
            scaled = rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-300)
    settings = {"how": how, "per_layer": per_layer, "of": _source(scores)}
    return _result(scaled.view_as(values), "normalized", [scores], settings)


def robust_spread(centred: Float[Tensor, "row n"]) -> Float[Tensor, "row 1"]:
    """1.4826 times the median absolute deviation of each row, whose median is 0.

    Where more than half of a row are equal that is 0: there of those that are not 0; infinite where all are equal.
    """
    size = centred.abs()
    spread = size.median(1, keepdim=True).values
    others = torch.where(size > 0, size, torch.nan).nanmedian(1, keepdim=True).values
    spread = torch.where(spread > 0, spread, others).nan_to_num(torch.inf)
    return 1.4826 * spread.clamp(min=torch.finfo(centred.dtype).tiny)


def rank_average(scores: Sequence[NeuronScores], weights: Sequence[float] = ()) -> NeuronScores:
    """Weighted mean of ranks (0 to 1) over localizers: what several of them agree on.

    Args:
        scores: Of one model.
        weights: One per localizer; none for equal ones.

    Raises:
        InputError: nothing to average, scores of different models, not as many weights as scores, or weights that
            are negative or all 0.
    """
    if weights and len(weights) != len(scores):
        raise InputError(f"{len(weights)} weights for {len(scores)} localizers: give one each")
    if any(weight < 0 for weight in weights) or (weights and not any(weights)):
        raise InputError(
            f"weights {', '.join(f'{w:g}' for w in weights)}: a mean takes weights of 0 or more, not all 0; for a "
            "difference use minus"
        )
    shares = torch.tensor(list(weights) or [1.0] * len(scores), dtype=torch.float64)
    ranks = [normalize(one).values.double() for one in scores]
    mean = sum((s * r for s, r in zip(shares / shares.sum(), ranks, strict=True)), torch.zeros(1, 1))
    settings = {"weights": shares.tolist(), "of": [_source(one) for one in scores]}
    return _result(mean, "rank-average", scores, settings)


def minus(forget: NeuronScores, retain: NeuronScores, strength: float = 1.0) -> NeuronScores:
    """Forget scores minus `strength` times retain scores, as they are; normalize first if scales differ.

    Raises:
        InputError: scores of different models.
    """
    values = forget.values.double() - strength * retain.values.double()
    settings = {"strength": strength, "of": [_source(forget), _source(retain)]}
    return _result(values, "minus", [forget, retain], settings)


def _ranks(row: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """From 0 to 1, ties at the mean of their places."""
    _, group, counts = row.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    places = last - (counts.double() + 1) / 2
    ranks: Tensor = places[group] / max(1, len(row) - 1)
    return ranks


def _source(scores: NeuronScores) -> dict[str, Any]:
    return {"method": scores.method, "settings": dict(scores.settings)}


def _result(
    values: Float[Tensor, "layer neuron"],
    method: str,
    of: Sequence[NeuronScores],
    settings: Mapping[str, Any],
) -> NeuronScores:
    if not of:
        raise InputError("no scores given: combine at least one localizer's")
    if len({one.fingerprint for one in of}) > 1:
        raise InputError("scores of different models cannot be combined: locate all on the same one")
    return NeuronScores(values.float(), method, of[0].fingerprint, of[0].atlas, settings)
