"""Ascent weighted by saturation and importance."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training


def satimp_loss(token_nll: Float[Tensor, " label"], beta1: float, beta2: float) -> Float[Tensor, " label"]:
    """SatImp (Yang et al. 2025, arXiv:2505.11953): -p ** beta1 * (1 - p) ** beta2 * nll, the weights carrying no
    gradient.

    With beta2 = 0 it is weighted gradient ascent, with both 0 gradient ascent; a token of probability 1 or 0
    is not pushed when both are positive.

    Args:
        token_nll: Negative log-likelihood of each target token, in nats.
        beta1: Power of the saturation weight, >= 0.
        beta2: Power of the importance weight, >= 0.

    Returns:
        One value for each token.
    """
    p = (-token_nll.detach()).exp()
    return -(p**beta1) * (1 - p) ** beta2 * token_nll


@dataclass(frozen=True)
class SatImp:
    """SatImp with a retain term."""

    beta1: float = 5.0
    """Power of the saturation weight."""
    beta2: float = 1.0
    """Power of the importance weight."""
    retain: Retain = Retain(term="nll", weight=1.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`satimp_loss`, a mean over each target's tokens and over the batch."""
        return forget.example_mean(satimp_loss(forget.token_nll, self.beta1, self.beta2)).mean()

    run = finetune
