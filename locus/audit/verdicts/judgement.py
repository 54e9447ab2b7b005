"""From figures to sentences: what an edit did, said only as far as the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

from locus.audit.intervals import Items, difference, ratio
from locus.audit.measurement import Measurement
from locus.audit.settings import Standards
from locus.audit.verdicts.controls import localized
from locus.audit.verdicts.forgetting import forgotten, general, left
from locus.audit.verdicts.resistance import hidden, returns
from locus.audit.verdicts.verdict import (
    NOT_NEXT_DOOR,
    Verdict,
    VerdictAnswer,
    in_percent,
    mean_of,
    unmeasured,
)

__all__ = ["judge", "left"]


def judge(
    edit: Measurement,
    base: Measurement,
    controls: Sequence[Measurement],
    standards: Standards,
    reference: Measurement | None = None,
) -> tuple[Verdict, ...]:
    """Answer the seven questions about one edit.

    Args:
        edit: What is judged.
        base: The model before it.
        controls: The same edit with random masks.
        standards: The lines between the answers.
        reference: A model that never knew. What it gives by guessing counts as forgotten.
    """
    gone = forgotten(edit, base, reference, standards)
    back = returns(edit, base, reference, standards)
    if gone.answer == "no" and back.answer != "not measured":
        back = Verdict("returns", "unclear", "It is not gone, so it cannot come back.", back.evidence)
    return (
        gone,
        hidden(edit, base, reference, standards),
        general(edit, base, reference, standards),
        _spared(edit, base, standards),
        _intact(edit, base, standards),
        back,
        localized(edit, controls, standards),
    )


_OTHERS = {
    "held_out.top1": "held-out facts",
    "neighbour.top1": "neighbours",
    "same_subject.top1": "other facts of the same subjects",
    "same_relation.top1": "other subjects of the same relations",
    "far.top1": "facts of neither",
}
"""Figures of facts that the edit did not see, and what a sentence calls them."""
_NEXT_DOOR = ("neighbour.top1", "same_subject.top1", "same_relation.top1")


def _spared(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    """Held-out facts decide (where there are none, the next kind does), and every other kind can only make it worse.

    Neighbours as a file has them are close by in any sense, so that losing them is "partly"; who lost the forgotten
    subjects' other facts, or other subjects of a forgotten relation, has lost other facts. "yes" takes facts next door,
    and no kind of which fewer than `Standards.spared` are left, however few they are.
    """
    judged = {
        key: one for key, what in _OTHERS.items() if (one := _kept(edit, base, key, what, s)) is not None
    }
    if not judged:
        sentence = "Other facts: not measured, there are neither held-out facts nor neighbours."
        return unmeasured("spared", sentence, tuple(_OTHERS)[:2])
    answer: VerdictAnswer = next((one for one, _ in judged.values() if one != "unclear"), "unclear")
    rank: tuple[VerdictAnswer, ...] = ("yes", "partly", "no")
    for key, (found, _) in judged.items():
        worst: VerdictAnswer = (
            "partly" if key == "neighbour.top1" and found == "no" and len(judged) > 1 else found
        )
        if worst in rank and answer in rank and rank.index(worst) > rank.index(answer):
            answer = worst
    doubts = [
        key
        for key, (found, _) in judged.items()
        if found == "unclear" and _share_kept(edit, base, key) < s.spared
    ]
    beside = any(key in judged for key in _NEXT_DOOR)
    if answer == "yes" and (doubts or not beside):
        answer = "unclear"  # a "yes" covers every kind that was asked, and facts next door among them
    words = {
        "yes": "Other facts survived",
        "partly": "Some other facts were lost",
        "no": "Other facts were lost",
        "unclear": "No verdict on other facts: too few, too close, or none next door",
    }
    told = "; ".join(sentence for _, sentence in judged.values())
    if not beside:
        told += f"; {NOT_NEXT_DOOR}"
    return Verdict("spared", answer, f"{words[answer]}: {told}.", tuple(judged))


def _share_kept(edit: Measurement, base: Measurement, key: str) -> float:
    """Share of the base's right answers of one kind that are still right; 1 where it had none."""
    after, before = _pair(edit, base, key)
    had = 0.0 if before is None else mean_of(before)
    return mean_of(after) / had if after is not None and had > 0 else 1.0


def _kept(
    edit: Measurement, base: Measurement, key: str, what: str, s: Standards
) -> tuple[VerdictAnswer, str] | None:
    """How many right answers of one kind are left; None where that was not measured."""
    after, before = _pair(edit, base, key)
    if after is None or before is None:
        return None
    told = f"{what} right {in_percent(mean_of(before))} → {in_percent(mean_of(after))}"
    kept, drop = ratio(after, before), difference(after, before)
    if kept is None or drop is None or drop.n < s.min_facts:
        return "unclear", told
    if mean_of(before) < 0.995:
        told += f", {in_percent(kept.mean)} as often as before"
    if kept.mean >= s.spared and kept.low >= s.spared_low:
        return "yes", told
    if drop.high >= 0:
        return "unclear", told
    return ("no" if kept.mean < s.spared_low else "partly"), told


def _intact(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    keys = ("text.kl", "text.nll")
    if edit.text is None or base.text is None:
        return unmeasured("intact", "Neutral text: not measured, no text was given.", keys)
    kl = float(edit.text.kl.double().mean())
    rise = float((edit.text.nll.double().mean() - base.text.nll.double().mean()).clamp(max=700).exp())
    told = (
        f"KL {kl:.3f} nats a token, perplexity ×{rise:.2f}" if kl < 1e3 else "its output is no longer finite"
    )
    if not rise <= s.broken:
        return Verdict("intact", "no", f"The model is broken on neutral text: {told}.", keys)
    if kl <= s.kl and rise <= s.perplexity:
        return Verdict("intact", "yes", f"Neutral text is read as before: {told}.", keys)
    return Verdict("intact", "partly", f"Neutral text is read differently: {told}.", keys)


def _pair(edit: Measurement, base: Measurement, key: str) -> tuple[Items | None, Items | None]:
    return edit.items(key), base.items(key)
