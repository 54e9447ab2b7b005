"""LaW: wash what is to go out of the MLPs, as far from the old values as the text allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.key_value.down_projections import DownProjection
from editors.key_value.edit_target import EditTarget
from editors.key_value.least_squares import SecondMomentMetric, least_squares_update
from editors.key_value.multilayer import MultilayerEdit, MultilayerWriter, Solve
from locus.errors import InputError


@dataclass(frozen=True)
class LaW(MultilayerEdit):
    """Large-scale knowledge washing (Wang et al. 2025, arXiv:2405.16720).

    Each layer's update D begins as MEMIT's and then climbs ‖D K‖², what it does to the facts' keys K, while its cost
    tr(D C Dᵀ) stays within `beta` times the first one's. Facts that are forgotten drop out of the next round, whose
    updates go on top. The climb is taken in the metric of C: it never leaves the span of KᵀC⁻¹, so it runs on a
    matrix of as many rows as there are facts, and what the paper does by Adam and projections is exact here.
    """

    target: EditTarget = EditTarget(lr=0.1, clamp=0.75)
    """The edit target of MEMIT's first update."""
    weight: float = 0.3
    """λ of MEMIT's first update, as a share of the number of neurons a layer."""
    beta: float = 1.1
    """Cost of an update, in costs of the one it began as."""
    climb: int = 20
    """Steps of the climb."""
    rounds: int = 4
    """How often a fact is written at most; a round edits the facts that are not forgotten yet."""
    ridge: float = 1e-3
    """Added to C's diagonal, as a share of its mean."""

    def solver(self, spread: MultilayerWriter) -> tuple[Solve, dict[str, Any]]:
        """MEMIT's update, climbed.

        Raises:
            InputError: C is not positive definite, or beta is below 1.
        """
        metrics = {
            layer: SecondMomentMetric.of(moment, self.ridge) for layer, moment in spread.moments.items()
        }
        weight = self.weight * spread.model.atlas.d_mlp

        def solve(
            one: DownProjection, keys: Float[Tensor, "n key"], residual: Float[Tensor, "d_model key"]
        ) -> Float[Tensor, "d_model n"]:
            return wash(metrics[one.layer], keys, residual, weight, self.beta, self.climb)

        return solve, {"conditions": [one.condition for one in metrics.values()]}


def wash(
    metric: SecondMomentMetric,
    keys: Float[Tensor, "n key"],
    residual: Float[Tensor, "d_model key"],
    weight: float,
    beta: float,
    climb: int,
) -> Float[Tensor, "d_model n"]:
    """MEMIT's update, climbed to do more to the keys at no more than `beta` times its cost.

    With G = Kᵀ C⁻¹ K an update B Kᵀ C⁻¹ does B G to the keys and costs tr(B G Bᵀ). Ascending ‖B G‖² in the metric
    of the cost is B ← B (I + η G), here with η = 1 / ‖G‖, and back onto the cost's sphere.

    Returns:
        An update of cost `beta` times that of `least_squares_update(metric, keys, residual, weight)`,
        or that one for climb = 0.

    Raises:
        InputError: beta is below 1.
    """
    if beta < 1:
        raise InputError(
            f"beta = {beta}: an update can cost at least as much as the one it began as: give 1 or more"
        )
    start = least_squares_update(metric, keys, residual, weight)
    if not climb or not bool(start.any()):
        return start
    solved = metric.solve(keys)
    gram = keys.mT @ solved
    inner = torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=gram.dtype), residual.mT).mT
    budget = beta * metric.cost(start)
    eta = 1.0 / float(torch.linalg.matrix_norm(gram, 2))
    for _ in range(climb):
        inner = inner + eta * inner @ gram
        cost = float((inner @ gram * inner).sum())
        inner = inner * (budget / cost) ** 0.5
    update: Tensor = inner @ solved.mT
    return update
