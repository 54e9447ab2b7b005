"""Gradient ascent on the forget targets."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.finetune import finetune
from editors.prediction import Prediction
from editors.retain import Retain
from editors.training import Training


def ga_loss(nll: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Gradient ascent: the negated cross-entropy of the forget targets (Jang et al. 2023, arXiv:2210.01504).

    Unbounded below: nothing but a stopping rule ends it.

    Args:
        nll: Negative log-likelihood of each target, summed over its tokens, in nats.
    """
    return -nll.mean()


@dataclass(frozen=True)
class GA:
    """Gradient ascent alone, stopped when the facts are gone; a reference point more than a remedy."""

    retain: Retain = Retain(term="none")
    """No retain term: the method as published."""
    training: Training = Training(min_steps=1)
    """Stops as soon as the facts are gone, for nothing repairs what it does to others."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`ga_loss` of the batch."""
        return ga_loss(forget.nll)

    run = finetune
