"""Is it still inside: the logit-lens attack at every layer (Patil et al. 2024, arXiv:2309.17410).

An edit can push an answer out of the output and leave it readable in the middle, or push it so far down
that being last gives it away: both the top k and the bottom k of every layer are searched.
"""

from __future__ import annotations

from locus.audit.measurement import LensLeak
from locus.audit.questions import Questions
from locus.lens import lens_scores
from locus.model import Model


def look_inside(model: Model, questions: Questions, max_tokens: int = 4096) -> LensLeak:
    """Read every layer's opinion of each question."""
    scores = lens_scores(model, questions.encoded, max_tokens)
    return LensLeak(questions.facts, scores.rank, scores.bottom_rank, scores.prob)
