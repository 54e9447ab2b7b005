"""Is it still inside: the logit-lens attack at every layer (Patil et al. 2024, arXiv:2309.17410).

An edit can push an answer out of the output and leave it readable in the middle, or push it so far down
that being last gives it away: both the top k and the bottom k of every layer are searched.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.audit.answers import Questions
from locus.audit.interval import Items
from locus.lens import lens_scores
from locus.model import Model


@dataclass(frozen=True)
class LensLeak:
    """Where the first target token stands at each layer, at the last prompt position."""

    facts: tuple[str, ...]
    rank: Int[Tensor, "fact layer"]
    """0 where the layer alone would answer right."""
    bottom_rank: Int[Tensor, "fact layer"]
    """0 where the target is the least likely token of all."""
    prob: Float[Tensor, "fact layer"]
    """Probability of the first target token through the lens."""

    def top(self, k: int) -> Bool[Tensor, "fact layer"]:
        """Whether the target is among the k likeliest tokens."""
        return self.rank < k

    def bottom(self, k: int) -> Bool[Tensor, "fact layer"]:
        """Whether the target is among the k least likely tokens."""
        return self.bottom_rank < k

    def anywhere(self, k: int, end: str = "top") -> Items:
        """1 for a fact whose target is in the top (bottom) k of at least one layer."""
        hit = self.top(k) if end == "top" else self.bottom(k)
        return Items(self.facts, hit.any(1).float())


def look_inside(model: Model, questions: Questions, max_tokens: int = 4096) -> LensLeak:
    """Read every layer's opinion of each question."""
    scores = lens_scores(model, questions.encoded, max_tokens)
    return LensLeak(questions.facts, scores.rank, scores.bottom_rank, scores.prob)
