"""Weighted gradient ascent: confident tokens are pushed hardest."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training


def wga_loss(token_nll: Float[Tensor, " label"], beta: float) -> Float[Tensor, " label"]:
    """Weighted gradient ascent (Wang et al. 2025, arXiv:2502.19301): -p ** beta * nll, the weight carrying no
    gradient.

    With beta = 0 it is gradient ascent; the push on a token fades as its probability does.

    Args:
        token_nll: Negative log-likelihood of each target token, in nats.
        beta: Power of the token's probability, >= 0.

    Returns:
        One value for each token.
    """
    return -((-token_nll.detach()).exp() ** beta) * token_nll


@dataclass(frozen=True)
class WGA:
    """Weighted gradient ascent with a retain term."""

    beta: float = 1.0
    """Power of the token's probability in its weight."""
    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`wga_loss`, a mean over each target's tokens and over the batch."""
        return forget.example_mean(wga_loss(forget.token_nll, self.beta)).mean()

    run = finetune
