"""Gradient ascent on the forget targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.memorization import extraction_likelihood, memorization_accuracy
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.model import Model
from locus.tokens import Encoded


def ga_loss(nll: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Gradient ascent: the negated cross-entropy of the forget targets (Jang et al. 2023, arXiv:2210.01504).

    Unbounded below: nothing but a stopping rule ends it.

    Args:
        nll: Negative log-likelihood of each target, summed over its tokens, in nats.
    """
    return -nll.mean()


@dataclass(frozen=True)
class GA:
    """Gradient ascent alone, stopped when the facts are forgotten; a baseline more than a remedy."""

    retain: Retain = Retain(term="none")
    """No retain term: the method as published."""
    training: Training = Training(min_steps=1)
    """Settings that stop as soon as the facts are forgotten: no term repairs the damage to other facts."""

    stop_extraction: float = 0.0
    """Stop when the extraction likelihood of the forget examples is at most this; 0 does not look."""
    stop_memorization: float = 0.0
    """Stop when their memorization accuracy is at most this as well; 0 does not look."""
    n_gram: int = 10
    """Length of the n-grams of the extraction likelihood."""

    def done(self, model: Model, forget: Sequence[Encoded]) -> bool:
        """Jang et al.'s stopping rules: both measures at or below their thresholds (those that are set)."""
        accuracy, likelihood = self.stop_memorization, self.stop_extraction
        if not accuracy and not likelihood:
            return False
        return not (
            (accuracy and memorization_accuracy(model, forget) > accuracy)
            or (likelihood and extraction_likelihood(model, forget, self.n_gram) > likelihood)
        )

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`ga_loss` of the batch."""
        return ga_loss(forget.nll)

    run = finetune
