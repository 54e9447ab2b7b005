"""Reverse KL to a teacher that has forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from editors.objectives.undial import lowered
from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import BOUNDED, Training
from locus.metrics import kl_divergence


def rkld_loss(
    logits: Float[Tensor, "label d_vocab"],
    ref_logits: Float[Tensor, "label d_vocab"],
    labels: Int[Tensor, " label"],
    strength: float,
) -> Float[Tensor, " label"]:
    """KL(edited || teacher), the teacher being the reference with the target's logit lowered (after Wang et al.
    2024, RKLD, arXiv:2406.01983).

    Mode-seeking: 0 where the edited model equals the teacher, and so at the reference itself when strength = 0.
    It differs from UNDIAL in the direction of the KL.

    Args:
        logits: Of the edited model.
        ref_logits: Of the model before the edit.
        labels: Target tokens.
        strength: By how much the target's logit is lowered.

    Returns:
        One value for each token, in nats.
    """
    return kl_divergence(logits, lowered(ref_logits, labels, strength))


@dataclass(frozen=True)
class RKLD:
    """Reverse KL to the lowered reference, with a retain term."""

    strength: float = 10.0
    """By how much the target's logit is lowered in the teacher."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit."""
    training: Training = BOUNDED
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`rkld_loss`, a mean over each target's tokens and over the batch."""
        return forget.example_mean(
            rkld_loss(forget.logits, forget.ref_logits, forget.labels, self.strength)
        ).mean()

    run = finetune
