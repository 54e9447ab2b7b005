"""Learn the forget set even better: the first half of task vectors and of Who's Harry Potter."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training

REINFORCING = Training(steps=30, min_steps=30, lr=1e-3, floor=0.0, goal=0.0, utility=0.0, max_kl=0.0)
"""Thirty steps, and no rule that stops forgetting."""


@dataclass(frozen=True)
class Reinforce:
    """Cross-entropy on what shall later go."""

    retain: Retain = Retain(term="none")
    """No retain term."""
    training: Training = REINFORCING
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """NLL per token of the forget targets, to be lowered."""
        return (forget.nll / forget.n_tokens).mean()

    run = finetune
