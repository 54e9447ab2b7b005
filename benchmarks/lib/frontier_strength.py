"""The strength of an edit at which it forgets as much as the others it is compared with."""

from __future__ import annotations

import math

from benchmarks.lib.frontier_cases import Case
from locus.audit.questions import Questions as Asked
from locus.audit.questions import ask
from locus.audit.state import State
from locus.delta import WeightDelta

STRONGEST = 1.5
CLOSE = 0.97
"""Of the goal's probability: arms this near below it forget equally."""
MOST_ASKED = 8


def equal_forgetting(case: Case, delta: WeightDelta, forget: Asked) -> tuple[float | None, float]:
    """A strength at which the case's mean probability is its goal or a little less (CLOSE), and what it is there.

    None, and what it is at strength 1, where STRONGEST does not do. Found by false position on the logarithm of the
    probability (the Illinois rule: an end that stays counts half; of the base only that it is not over 1); at most
    MOST_ASKED strengths are asked between.
    """
    state = State("edit", "edit", case.model, delta)

    def prob(strength: float) -> float:
        with state.at_strength(case.model, strength) as edited:
            return float(case.likely(ask(edited, forget)).mean())

    def above(prob: float) -> float:
        """How far above the middle of what is accepted, in nats."""
        return math.log(max(prob, 1e-30) / max(case.goal, 1e-30)) - math.log(CLOSE) / 2

    at_one = prob(1.0)
    if at_one > case.goal:
        weak, strong, high, found = 1.0, STRONGEST, above(at_one), prob(STRONGEST)
        if found > case.goal:
            return None, at_one
    else:
        weak, strong, high, found = 0.0, 1.0, above(1.0), at_one
    low, side = above(found), 0
    for _ in range(MOST_ASKED):
        if found >= CLOSE * case.goal:
            break
        middle = weak + (strong - weak) * high / (high - low)
        if (here := prob(middle)) > case.goal:
            weak, high, low, side = middle, above(here), low / 2 if side > 0 else low, 1
        else:
            strong, low, found = middle, above(here), here
            high, side = high / 2 if side < 0 else high, -1
    return strong, found
