"""An edit beside the base and beside its controls, on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from locus.audit.intervals import Interval, Items, difference, gain
from locus.audit.measurement import Measurement
from locus.audit.metric_table import FIGURES, figure_of
from locus.audit.place_comparison import P_SHOWN, PlaceTest, holm, place_test
from locus.audit.settings import Standards
from locus.audit.verdicts.verdict import Verdict, unmeasured
from locus.audit.weight_change import WeightChange

Outcome = Literal["better", "worse", "no difference shown", "too few facts", "too few controls"]
SAME_SIZE = 0.05
"""A control whose number of weights differs by more than this share is none of equal size."""


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
    """Paired differences of every figure that both sides have.

    Args:
        edit: What is judged.
        base: The model before it.
        controls: Its controls of equal size.
        standards: How many facts and controls a verdict takes.
    """
    found = []
    for key in (*FIGURES, *sorted(set(edit.extra) - set(FIGURES))):
        mine, theirs = edit.items(key), base.items(key)
        if mine is None:
            continue
        share = _is_share(key)
        if theirs is not None and (d := difference(mine, theirs, share=share)) is not None:
            found.append(Comparison(key, "base", d, _outcome(key, d, standards)))
        others = _others(controls, key)
        if others and (d := gain(mine, others, share=share)) is not None:
            tested = place_test(mine, others, share)
            found.append(Comparison(key, "controls", d, _placed(key, d.n, tested, standards)))
    return found


def size_ratio(edit: WeightChange, control: WeightChange) -> float:
    """Weights of a control over those of the edit: of their masks where both deltas say them, else those changed."""
    if edit.n_allowed is not None and control.n_allowed is not None:
        return control.n_allowed / max(1, edit.n_allowed)
    return control.n_changed / max(1, edit.n_changed)


def localized(edit: Measurement, controls: Sequence[Measurement], s: Standards) -> Verdict:
    """Whether the place mattered: better than the same edit with masks of equal size at random places.

    The figures are declared beforehand (`Standards.place_figures`) and corrected for their number (Holm); of each, the
    edit's mask is one draw among the controls' (`locus.audit.place_comparison`).

    Args:
        edit: What is judged.
        controls: Its controls of equal size.
        s: The figures, and how many facts and controls a verdict takes.
    """
    keys = s.place_figures
    if not controls:
        sentence = "Location: not measured, no control edits with random masks of equal size were given."
        return unmeasured("localized", sentence, keys)
    masks = f"{len(controls)} random mask{'s' if len(controls) > 1 else ''} of equal size"
    tested: dict[str, PlaceTest] = {}
    for key in keys:
        others, mine = _others(controls, key), edit.items(key)
        if mine is not None and len(set(mine.groups)) >= s.min_facts and len(others) >= s.min_controls:
            tested[key] = place_test(mine, others, _is_share(key))
    if len(controls) < s.min_controls:
        sentence = (
            f"{masks} cannot show whether the place mattered: {s.min_controls} are needed (--controls)."
        )
        return Verdict("localized", "unclear", sentence[:1].upper() + sentence[1:], keys)
    if not tested:
        return Verdict("localized", "unclear", f"Too few facts to compare with {masks}.", keys)
    corrected = dict(zip(tested, holm([one.p for one in tested.values()]), strict=True))
    shown = {key: _better(key, tested[key]) for key, p in corrected.items() if p < P_SHOWN}
    wins, losses = (
        ", ".join(FIGURES[key].label for key, won in shown.items() if won is side) for side in (True, False)
    )
    smallest = f"smallest p {min(corrected.values()):.2g} for {len(tested)} figure{'s' * (len(tested) > 1)}"
    if wins and not losses:
        return Verdict("localized", "yes", f"Better than {masks} on {wins} ({smallest}).", keys)
    if losses and not wins:
        return Verdict("localized", "no", f"Worse than {masks} on {losses} ({smallest}).", keys)
    if wins and losses:
        sentence = f"Beside {masks}: better on {wins}, worse on {losses} ({smallest})."
        return Verdict("localized", "partly", sentence, keys)
    sentence = f"No difference from {masks} is shown beyond what such masks differ by ({smallest})."
    return Verdict("localized", "unclear", sentence, keys)


def _others(controls: Sequence[Measurement], key: str) -> list[Items]:
    return [items for c in controls if (items := c.items(key)) is not None]


def _is_share(key: str) -> bool:
    return figure_of(key).unit == "share"


def _better(key: str, tested: PlaceTest) -> bool:
    return tested.higher == (figure_of(key).better == "higher")


def _placed(key: str, n_facts: int, tested: PlaceTest, s: Standards) -> Outcome:
    """The outcome of one figure beside the controls, not corrected for the number of figures."""
    if n_facts < s.min_facts:
        return "too few facts"
    if tested.n_controls < s.min_controls:
        return "too few controls"
    if tested.p >= P_SHOWN:
        return "no difference shown"
    return "better" if _better(key, tested) else "worse"


def _outcome(key: str, d: Interval, standards: Standards) -> Outcome:
    if d.n < standards.min_facts:
        return "too few facts"
    if not d.excludes_zero:
        return "no difference shown"
    return "better" if (d.high < 0) == (figure_of(key).better == "lower") else "worse"
