"""MEMIT: many facts at once, spread over several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from editors.key_value.down_projections import DownProjection
from editors.key_value.least_squares import SecondMomentMetric, least_squares_update
from editors.key_value.multilayer import MultilayerEdit, MultilayerWriter, Solve


@dataclass(frozen=True)
class MEMIT(MultilayerEdit):
    """Mass-editing memory in a transformer (Meng et al. 2023, arXiv:2210.07229).

    Each layer's update is R Kᵀ (λ C + K Kᵀ)⁻¹: nearly what the facts' keys K are to become (the residuals R), at
    least cost to the text's second moment C. Facts edited in an earlier batch take part with a residual of zero.
    Where the mask holds only some neurons of a layer, keys and metric are those of these neurons.

    By default a fact is written over with wrong answers (`target`): a refusal, the same for all, comes off all of them
    when a few are taught again.
    """

    weight: float = 0.1
    """λ, as a share of the number of neurons a layer (the paper's 15,000 for GPT-J is 0.92)."""
    ridge: float = 1e-3
    """Added to C's diagonal, as a share of its mean."""

    def solver(self, spread: MultilayerWriter) -> tuple[Solve, dict[str, Any]]:
        """R Kᵀ (λ C + K Kᵀ)⁻¹.

        Raises:
            InputError: C is not positive definite.
        """
        metrics = {
            layer: SecondMomentMetric.of(moment, self.ridge) for layer, moment in spread.moments.items()
        }
        weight = self.weight * spread.model.atlas.d_mlp

        def solve(
            one: DownProjection, keys: Float[Tensor, "n key"], residual: Float[Tensor, "d_model key"]
        ) -> Float[Tensor, "d_model n"]:
            every, wanted = spread.written.with_earlier(one, keys, residual)
            return least_squares_update(metrics[one.layer], every, wanted, weight)

        return solve, {"conditions": [one.condition for one in metrics.values()]}
