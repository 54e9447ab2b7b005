"""What a verdict is, and where the lines between its answers lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from locus.audit.intervals import Items
from locus.audit.measurement import Measurement

VerdictAnswer = Literal["yes", "partly", "no", "unclear", "not measured"]
VerdictQuestion = Literal["forgotten", "general", "spared", "intact", "hidden", "returns", "localized"]

NOT_NEXT_DOOR = "facts next door (the same subjects, the same relations): not measured"
"""What a verdict on other facts says where none of them was close to a forgotten one."""


@dataclass(frozen=True)
class Verdict:
    """One question about an edit, answered."""

    question: VerdictQuestion
    answer: VerdictAnswer
    """yes is always the good end: forgotten, spared, intact, *not* hidden, *not* returning, better than controls."""
    sentence: str
    evidence: tuple[str, ...]
    """Keys of the figures behind it."""


def unmeasured(question: VerdictQuestion, sentence: str, keys: tuple[str, ...]) -> Verdict:
    """There is no evidence: never a pass."""
    return Verdict(question, "not measured", sentence, keys)


def mean_of(items: Items) -> float:
    """Mean of the values."""
    return float(items.values.double().mean())


def mean_at(one: Measurement | None, key: str) -> float | None:
    """Mean of one figure of a state; None where there is no such state or it was not measured."""
    items = None if one is None else one.items(key)
    return None if items is None or len(items.values) == 0 else mean_of(items)


def in_percent(value: float) -> str:
    """A share as a sentence says it."""
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return f"{100 * value:.1f} %" if 0 < abs(value) < 0.095 else f"{100 * value:.0f} %"
