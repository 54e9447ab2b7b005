"""An edit beside the base and beside its controls, on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from locus.audit.intervals import Interval, difference, gain
from locus.audit.measurement import Measurement
from locus.audit.metric_table import FIGURES, figure_of
from locus.audit.settings import Standards
from locus.audit.verdicts.verdict import Verdict, unmeasured

Outcome = Literal["better", "worse", "no difference shown", "too few facts"]


@dataclass(frozen=True)
class Comparison:
    """One figure of an edit against the base, or against the mean of the controls, on the same items."""

    key: str
    against: Literal["base", "controls"]
    difference: Interval
    """edit - other, in the figure's unit."""
    outcome: Outcome


def compare_states(
    edit: Measurement, base: Measurement, controls: Sequence[Measurement], standards: Standards
) -> list[Comparison]:
    """Paired differences of every figure that both sides have."""
    found = []
    for key in (*FIGURES, *sorted(set(edit.extra) - set(FIGURES))):
        mine, theirs = edit.items(key), base.items(key)
        if mine is None:
            continue
        if theirs is not None and (d := difference(mine, theirs, share=_is_share(key))) is not None:
            found.append(Comparison(key, "base", d, _outcome(key, d, standards)))
        others = [items for c in controls if (items := c.items(key)) is not None]
        if others and (d := gain(mine, others, share=_is_share(key))) is not None:
            found.append(Comparison(key, "controls", d, _outcome(key, d, standards)))
    return found


def _is_share(key: str) -> bool:
    return figure_of(key).unit == "share"


def _outcome(key: str, d: Interval, standards: Standards) -> Outcome:
    if d.n < standards.min_facts:
        return "too few facts"
    if not d.excludes_zero:
        return "no difference shown"
    return "better" if (d.high < 0) == (figure_of(key).better == "lower") else "worse"


def localized(edit: Measurement, controls: Sequence[Measurement], s: Standards) -> Verdict:
    """Whether the place mattered: better than the same edit with random masks of equal size."""
    keys = (
        "forget.prob", "paraphrase.top1", "held_out.top1", "neighbour.top1", "text.kl", "lens.top10", "relearn.prob",
    )  # fmt: skip
    if not controls:
        sentence = "Location: not measured, no control edits with random masks were given."
        return unmeasured("localized", sentence, keys)
    wins, losses, seen = [], [], False
    for key in keys:
        others = [items for c in controls if (items := c.items(key)) is not None]
        mine = edit.items(key)
        if mine is None or not others or (d := gain(mine, others, share=_is_share(key))) is None:
            continue
        outcome = _outcome(key, d, s)
        seen |= outcome != "too few facts"
        if outcome == "better":
            wins.append(FIGURES[key].label)
        elif outcome == "worse":
            losses.append(FIGURES[key].label)
    masks = f"{len(controls)} random mask{'s' if len(controls) > 1 else ''} of equal size"
    if not seen:
        return Verdict("localized", "unclear", f"Too few facts to compare with {masks}.", keys)
    if wins and not losses:
        return Verdict("localized", "yes", f"Better than {masks} on {', '.join(wins)}.", keys)
    if losses and not wins:
        return Verdict("localized", "no", f"Worse than {masks} on {', '.join(losses)}.", keys)
    if wins and losses:
        sentence = f"Beside {masks}: better on {', '.join(wins)}, worse on {', '.join(losses)}."
        return Verdict("localized", "partly", sentence, keys)
    return Verdict(
        "localized",
        "unclear",
        f"No difference from {masks} is shown: where it was edited did not matter.",
        keys,
    )
