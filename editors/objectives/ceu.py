"""Cross-entropy to the model's own prediction with the target taken out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training


def ceu_loss(
    logits: Float[Tensor, "label d_vocab"], labels: Int[Tensor, " label"]
) -> Float[Tensor, " label"]:
    """Cross-entropy unlearning (Yang 2025, arXiv:2503.01224): CE to softmax(z with z_target = -inf), held constant.

    The gradient in the logits is p - q, q being p without the target and renormalised: it pushes the target down
    by p_target and raises the others in proportion to themselves, and vanishes as p_target does.

    Returns:
        One value for each token.
    """
    target = logits.detach().scatter(1, labels[:, None], -torch.inf).softmax(-1)
    return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True)
class CEU:
    """Cross-entropy unlearning with a retain term."""

    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`ceu_loss`, a mean over each target's tokens and over the batch."""
        return forget.example_mean(ceu_loss(forget.logits, forget.labels)).mean()

    run = finetune
