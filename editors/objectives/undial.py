"""Self-distillation from logits with the target lowered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import BOUNDED, Training


def lowered(
    ref_logits: Float[Tensor, "label d_vocab"], labels: Int[Tensor, " label"], strength: float
) -> Float[Tensor, "label d_vocab"]:
    """The reference's logits with each label's lowered by `strength`."""
    return ref_logits.scatter_add(1, labels[:, None], torch.full_like(ref_logits[:, :1], -strength))


def undial_loss(
    logits: Float[Tensor, "label d_vocab"],
    ref_logits: Float[Tensor, "label d_vocab"],
    labels: Int[Tensor, " label"],
    beta: float,
) -> Float[Tensor, " label"]:
    """UNDIAL (Dong et al. 2024, arXiv:2402.10052): cross-entropy to softmax(z_ref - beta * onehot(target)).

    Bounded below by the teacher's entropy, so it cannot run away; with beta = 0 it is distillation of the
    reference, whose gradient is 0 at the reference.

    Args:
        logits: Of the edited model.
        ref_logits: Of the model before the edit.
        labels: Target tokens.
        beta: By how much the target's logit is lowered.

    Returns:
        One value for each token.
    """
    return F.cross_entropy(logits, lowered(ref_logits, labels, beta).softmax(-1), reduction="none")


@dataclass(frozen=True)
class UNDIAL:
    """UNDIAL with a retain term."""

    beta: float = 10.0
    """By how much the target's logit is lowered in the teacher."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit."""
    training: Training = BOUNDED
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`undial_loss`, a mean over each target's tokens and over the batch."""
        return forget.example_mean(
            undial_loss(forget.logits, forget.ref_logits, forget.labels, self.beta)
        ).mean()

    run = finetune
