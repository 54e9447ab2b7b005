"""NPO without a reference: the length-normalised likelihood itself is pushed down."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.errors import InputError


def simnpo_loss(
    nll: Float[Tensor, " batch"], n_tokens: Int[Tensor, " batch"], beta: float, margin: float
) -> Float[Tensor, ""]:
    """Simple NPO (Fan et al. 2024, arXiv:2410.07163).

    Equals NPO on the NLL per token with the margin as every example's reference. As beta -> 0 its gradient
    becomes that of gradient ascent on the NLL per token.

    Args:
        nll: Negative log-likelihood of each target, summed over its tokens, in nats.
        n_tokens: Tokens of each target.
        beta: Inverse temperature, > 0.
        margin: NLL per token, in nats, from which on the push fades.

    Raises:
        ValueError: beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return (-2 / beta) * F.logsigmoid(beta * (nll / n_tokens - margin)).mean()


@dataclass(frozen=True)
class SimNPO:
    """SimNPO with a retain term; needs no reference for the forget examples."""

    beta: float = 2.5
    """Inverse temperature; 2.5 to 4.5 in the paper."""
    margin: float = 0.0
    """NLL per token from which on the push fades, in nats; 0 in the paper."""
    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"beta = {self.beta}: must be positive")

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`simnpo_loss` of the batch."""
        return simnpo_loss(forget.nll, forget.n_tokens, self.beta, self.margin)

    run = finetune
