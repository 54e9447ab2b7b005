"""Negative preference optimization."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.errors import InputError


def npo_loss(
    nll: Float[Tensor, " batch"], ref_nll: Float[Tensor, " batch"], beta: float
) -> Float[Tensor, ""]:
    """Negative preference optimization on forget examples (Zhang et al. 2024, arXiv:2404.05868).

    Bounded below by 0. As beta -> 0 its gradient becomes gradient ascent's; as an example is forgotten
    (nll far above ref_nll) its gradient vanishes.

    Args:
        nll: Negative log-likelihood of each target, summed over its tokens, in nats.
        ref_nll: The same under the model before the edit.
        beta: Inverse temperature, > 0.

    Returns:
        Mean over the batch; (2 / beta) * ln 2 where nll == ref_nll.

    Raises:
        ValueError: beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return (-2 / beta) * F.logsigmoid(beta * (nll - ref_nll)).mean()


@dataclass(frozen=True)
class NPO:
    """NPO with a retain term: the default edit."""

    beta: float = 0.1
    """Inverse temperature: how soon a forgotten example stops being pushed."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit, on retain facts and neutral text."""
    training: Training = Training()
    """How the located weights are trained."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"beta = {self.beta}: must be positive")

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`npo_loss` of the batch."""
        return npo_loss(forget.nll, forget.ref_nll, self.beta)

    run = finetune
