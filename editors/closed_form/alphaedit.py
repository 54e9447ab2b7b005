"""AlphaEdit: MEMIT's residuals, written only where text does not go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from editors.key_value.down_projections import DownProjection
from editors.key_value.least_squares import NullSpace, write_within
from editors.key_value.multilayer import MultilayerEdit, MultilayerWriter, Solve


@dataclass(frozen=True)
class AlphaEdit(MultilayerEdit):
    """Null-space constrained editing (Fang et al. 2025, arXiv:2410.02355).

    Each layer's update is projected onto the directions in which keys over text hardly vary, so that text is
    kept by construction and the solve only weighs the facts: those of this batch, which are to move, those of
    earlier batches, which are to stay, and the update's own size.

    By default a fact is written over with wrong answers (`target`): a refusal, the same for all, comes off all of them
    when a few are taught again (benchmarks/README.md, "Fresh facts").
    """

    threshold: float = 0.5
    """A direction counts as free when its eigenvalue is below this share of the mean one. (The paper's absolute
    2e-2 depends on the scale of a model's activations.)"""
    l2: float = 0.1
    """Weight of the update's size, as a share of the mean squared norm of the facts' keys in the null space."""

    def solver(self, spread: MultilayerWriter) -> tuple[Solve, dict[str, Any]]:
        """Least squares within the null space.

        Raises:
            InputError: a layer has no free direction.
        """
        spaces = {layer: NullSpace.of(moment, self.threshold) for layer, moment in spread.moments.items()}

        def solve(
            one: DownProjection, keys: Float[Tensor, "n key"], residual: Float[Tensor, "d_model key"]
        ) -> Float[Tensor, "d_model n"]:
            space = spaces[one.layer]
            size = float((space.basis.mT @ keys).square().sum(0).mean())
            return write_within(space, keys, residual, self.l2 * size, spread.written.earlier(one))

        about = {
            "free": [space.basis.shape[1] for space in spaces.values()],
            "energy": [space.kept for space in spaces.values()],
        }
        return solve, about
