"""Plain cross-entropy on refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from editors.refusals import refusal
from editors.training.finetune import finetune
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.fact import Example, Fact


def idk_loss(refusal_nll: Float[Tensor, " batch"], n_tokens: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Cross-entropy per token of the refusals (Maini et al. 2024, arXiv:2401.06121; Ishibashi & Shimodaira 2023,
    arXiv:2309.11852).

    Teaches what to say, not what to forget: the answer tends to stay readable in the model's middle layers.

    Args:
        refusal_nll: NLL of each refusal, summed over its tokens, in nats.
        n_tokens: Tokens of each refusal.
    """
    return (refusal_nll / n_tokens).mean()


@dataclass(frozen=True)
class IDK:
    """Fine-tuning on refusals with a retain term."""

    retain: Retain = Retain(term="nll", weight=5.0)
    """Cross-entropy on the retain set."""
    training: Training = Training()
    """How the located weights are trained."""

    def answer(self, fact: Fact, pool: Sequence[Fact], step: int) -> Example:
        """The refusal that is taught."""
        return refusal(fact, self.training.seed)

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`idk_loss` of the refusals."""
        taught = forget.answer
        return idk_loss(taught.nll, taught.n_tokens)

    run = finetune
