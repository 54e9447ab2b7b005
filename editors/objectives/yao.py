"""Ascent on the targets, descent on answers that belong to other facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from editors.refusals import mismatched
from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.fact import Example, Fact


def yao_loss(
    token_nll: Float[Tensor, " batch"],
    mismatch_token_nll: Float[Tensor, " batch"],
    ascent: float,
    mismatch: float,
) -> Float[Tensor, ""]:
    """Large language model unlearning (Yao et al. 2023, arXiv:2310.10683), without its KL term on retain data.

    -ascent * NLL(target) + mismatch * NLL(random answer), both per token. With mismatch = 0 and ascent = 1 it is
    gradient ascent per token.

    Args:
        token_nll: NLL per token of each target, in nats.
        mismatch_token_nll: NLL per token of an answer that belongs to another fact.
        ascent: Weight of the ascent.
        mismatch: Weight of the mismatched answers.
    """
    return (mismatch * mismatch_token_nll - ascent * token_nll).mean()


@dataclass(frozen=True)
class Yao:
    """Ascent, mismatched answers and KL on the retain set."""

    ascent: float = 0.5
    """Weight of the ascent on the targets."""
    mismatch: float = 1.0
    """Weight of the mismatched answers."""
    retain: Retain = Retain(term="kl", weight=1.0)
    """KL to the model before the edit."""
    training: Training = Training()
    """How the located weights are trained."""

    def answer(self, fact: Fact, pool: Sequence[Fact], step: int) -> Example:
        """The target of a random other fact."""
        return mismatched(fact, pool, self.training.seed, step)

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`yao_loss` of the batch."""
        other = forget.answer
        return yao_loss(forget.nll / forget.n_tokens, other.nll / other.n_tokens, self.ascent, self.mismatch)

    run = finetune
