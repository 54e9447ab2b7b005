"""Direct preference optimization towards a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from editors.refusals import refusal
from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.errors import InputError
from locus.fact import Example, Fact


def dpo_loss(
    preferred_nll: Float[Tensor, " batch"],
    preferred_ref_nll: Float[Tensor, " batch"],
    nll: Float[Tensor, " batch"],
    ref_nll: Float[Tensor, " batch"],
    beta: float,
) -> Float[Tensor, ""]:
    """DPO with the target as the dispreferred answer (Rafailov et al. 2023, arXiv:2305.18290; as unlearning, Maini
    et al. 2024, arXiv:2401.06121).

    -(2 / beta) log sigmoid(beta * ((nll - ref_nll) - (preferred_nll - preferred_ref_nll))), mean over the batch:
    scaled like NPO, which it equals when the preferred answer's NLL stays at its reference. As beta -> 0 its
    gradient becomes that of `preferred_nll - nll`.

    Args:
        preferred_nll: NLL of the preferred answer, summed over its tokens, in nats.
        preferred_ref_nll: The same under the model before the edit.
        nll: NLL of the target that must go.
        ref_nll: The same under the model before the edit.
        beta: Inverse temperature, > 0.

    Raises:
        ValueError: beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    margin = (nll - ref_nll) - (preferred_nll - preferred_ref_nll)
    return (-2 / beta) * F.logsigmoid(beta * margin).mean()


@dataclass(frozen=True)
class DPO:
    """DPO that prefers a refusal to the target, with a retain term (IdkDPO)."""

    beta: float = 0.1
    """Inverse temperature."""
    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise InputError(f"beta = {self.beta}: must be positive")

    def answer(self, fact: Fact, pool: Sequence[Fact], step: int) -> Example:
        """The refusal that is preferred."""
        return refusal(fact, self.training.seed)

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`dpo_loss` of the batch."""
        preferred = forget.answer
        return dpo_loss(preferred.nll, preferred.ref_nll, forget.nll, forget.ref_nll, self.beta)

    run = finetune
