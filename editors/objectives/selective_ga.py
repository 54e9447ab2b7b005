"""Memory-aware gradient ascent: only what is still memorized is pushed."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training


def selective_ga_loss(
    nll: Float[Tensor, " batch"], memorized: Float[Tensor, " batch"], threshold: float
) -> Float[Tensor, ""]:
    """Gradient ascent on the examples memorized above a threshold (Barbulescu & Triantafillou 2024,
    arXiv:2405.03097).

    With a threshold below 0 it is gradient ascent; it is 0, without a gradient, when no example is above.

    Args:
        nll: Negative log-likelihood of each target, summed over its tokens, in nats.
        memorized: Share of each target's tokens that are the model's first choice.
        threshold: Examples at or below it are left alone.
    """
    return -(nll * (memorized > threshold)).mean()


@dataclass(frozen=True)
class SelectiveGA:
    """Gradient ascent on each example until it is no longer memorized."""

    threshold: float = 0.3
    """Memorization accuracy at or below which an example is left alone."""
    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`selective_ga_loss` of the batch."""
        return selective_ga_loss(forget.nll, forget.token_correct, self.threshold)

    run = finetune
