"""Gradient difference: gradient ascent on the forget facts, descent on the retain facts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.objectives.ga import ga_loss
from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training


@dataclass(frozen=True)
class GradDiff:
    """Gradient ascent with a retain term (Liu et al. 2022, arXiv:2203.12817; Maini et al. 2024, arXiv:2401.06121)."""

    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`ga_loss` of the batch; the retain term is added by the loop."""
        return ga_loss(forget.nll)

    run = finetune


@dataclass(frozen=True)
class KLMin:
    """Gradient ascent with KL(reference || edited) on the retain set (TOFU's KL-min), at target positions only."""

    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`ga_loss` of the batch; the retain term is added by the loop."""
        return ga_loss(forget.nll)

    run = finetune
