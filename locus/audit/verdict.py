"""What a verdict is, and where the lines between its answers lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from locus.audit.interval import Items
from locus.audit.measurement import Measurement

Answer = Literal["yes", "partly", "no", "unclear", "not measured"]
Question = Literal["forgotten", "general", "spared", "intact", "hidden", "returns", "localized"]


@dataclass(frozen=True)
class Standards:
    """The lines between yes, partly and no. They are conventions, kept in audit.json beside the verdicts."""

    min_facts: int = 6
    """Fewer facts give no verdict (a sign test cannot reach 5 % below six)."""
    forgotten: float = 0.1
    """Forgotten: at most this share of the base's p(target) and of its right answers remains."""
    general: float = 0.25
    """Forgotten in other words too: at most this share of the base's right paraphrases remains."""
    spared: float = 0.9
    """Spared: at least this share of the base's right held-out answers remains ..."""
    spared_low: float = 0.75
    """... and the interval does not reach below this."""
    kl: float = 0.1
    """Intact: at most this KL in nats a token on neutral text ..."""
    perplexity: float = 1.1
    """... and at most this perplexity beside the base's."""
    broken: float = 1.5
    """Broken: neutral perplexity above this multiple of the base's."""
    hidden: float = 0.1
    """Not readable inside: at most this share of facts in some layer's top 10."""
    recovered: float = 0.25
    """Does not come back: at most this share of what was removed returns under an attack."""


@dataclass(frozen=True)
class Verdict:
    """One question about an edit, answered."""

    question: Question
    answer: Answer
    """yes is always the good end: forgotten, spared, intact, *not* hidden, *not* returning, better than controls."""
    sentence: str
    evidence: tuple[str, ...]
    """Keys of the figures behind it."""


def unmeasured(question: Question, sentence: str, keys: tuple[str, ...]) -> Verdict:
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
