"""Representation misdirection: hidden states of the forget facts are steered to a random direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction, block_numbers, steering_layer
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.errors import InputError
from locus.random_streams import generator


def rmu_loss(
    hidden: Float[Tensor, "label d_model"],
    direction: Float[Tensor, " d_model"],
    length: Float[Tensor, " label"],
) -> Float[Tensor, " label"]:
    """Squared distance of hidden states from a random direction (Li et al. 2024, RMU, arXiv:2403.03218).

    Mean over dimensions of (h - length * direction)^2; 0 when the state is that vector.

    Args:
        hidden: Block outputs of the edited model.
        direction: A unit vector.
        length: Of the vector steered to, at each position: RMU's constant c, or Adaptive RMU's multiple of the
            reference state's norm.

    Returns:
        One value for each position.
    """
    goal = length[:, None] * direction
    return F.mse_loss(hidden, goal, reduction="none").mean(-1)


@dataclass(frozen=True)
class RMU:
    """RMU, or Adaptive RMU (Dang et al. 2024, arXiv:2408.06223), with the reference's hidden states held on the
    retain set. The forward ends at the steered layer: only located weights at or below it can learn.
    """

    layer: int = -1
    """Block whose output is steered; -1 for the one at 7/32 of the depth, RMU's for a 7B model."""
    coefficient: float = 5.0
    """Length of the vector steered to: times the reference state's norm if adaptive, else RMU's c (6.5 to 20)."""
    adaptive: bool = True
    """Scale the length to the model's own hidden states."""
    retain: Retain = Retain(term="hidden", weight=100.0)
    """Retain term on the steered block's outputs (alpha 100 to 1200 in the paper)."""
    training: Training = Training(steps=80, min_steps=20, floor=0.0)
    """How the located weights are trained. The targets' probability is only measured at checks."""

    def __post_init__(self) -> None:
        if self.layer < -1:
            raise InputError(
                f"layer = {self.layer}: a block from 0 up, or -1 for the one at 7/32 of the depth"
            )

    def steered_layer(self, n_layers: int) -> int:
        """The block whose output is steered, and held on retain data.

        Raises:
            InputError: the model has no such block.
        """
        return (
            steering_layer(n_layers) if self.layer < 0 else block_numbers([self.layer], n_layers, "layer")[0]
        )

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`rmu_loss`, a mean over each target's tokens and over the batch."""
        layer = self.steered_layer(forget.model.atlas.n_layers)
        hidden = forget.hidden([layer])[0].float()
        length = torch.full_like(hidden[:, 0], self.coefficient)
        if self.adaptive:
            length = length * forget.ref_hidden([layer])[0].float().norm(dim=-1)
        drawn = torch.rand(hidden.shape[-1], generator=generator(self.training.seed, "direction", 0)).to(
            hidden
        )
        return forget.example_mean(rmu_loss(hidden, drawn / drawn.norm(), length)).mean()

    run = finetune
