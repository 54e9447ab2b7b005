"""From figures to sentences: what an edit did, said only as far as the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

from locus.audit.intervals import Items, difference, ratio
from locus.audit.measurement import Measurement
from locus.audit.settings import Standards
from locus.audit.verdicts.controls import localized
from locus.audit.verdicts.resistance import hidden, returns
from locus.audit.verdicts.verdict import Verdict, VerdictAnswer, in_percent, mean_at, mean_of, unmeasured


def judge(
    edit: Measurement,
    base: Measurement,
    controls: Sequence[Measurement],
    standards: Standards,
    reference: Measurement | None = None,
) -> tuple[Verdict, ...]:
    """VerdictAnswer the seven questions about one edit.

    Args:
        edit: What is judged.
        base: The model before it.
        controls: The same edit with random masks.
        standards: The lines between the answers.
        reference: A model that never knew. What it gives by guessing counts as forgotten.
    """
    forgotten = _forgotten(edit, base, reference, standards)
    back = returns(edit, base, reference, standards)
    if forgotten.answer == "no" and back.answer != "not measured":
        back = Verdict("returns", "unclear", "It is not gone, so it cannot come back.", back.evidence)
    return (
        forgotten,
        _general(edit, base, reference, standards),
        _spared(edit, base, standards),
        _intact(edit, base, standards),
        hidden(edit, base, reference, standards),
        back,
        localized(edit, controls, standards),
    )


def left(edit: Items, base: Items, guessed: float | None) -> float:
    """Share of the base's mean that is left, above what a model that never knew has by guessing.

    0 where the edited model has no more than that; infinite where the base itself has none to lose.
    """
    floor = guessed or 0.0
    known = mean_of(base) - floor
    return max(0.0, mean_of(edit) - floor) / known if known > 0 else float("inf")


def _forgotten(edit: Measurement, base: Measurement, reference: Measurement | None, s: Standards) -> Verdict:
    keys = ("forget.prob", "forget.top1")
    after, before = _pair(edit, base, "forget.prob")
    right, was_right = _pair(edit, base, "forget.top1")
    if after is None or before is None or right is None or was_right is None:
        return unmeasured("forgotten", "Forgetting: not measured.", keys)
    n = len(right.values)
    told = (
        f"p(target) {in_percent(mean_of(before))} → {in_percent(mean_of(after))}, "
        f"answered right {int(was_right.values.sum())} → {int(right.values.sum())} of {n}"
    )
    guess, guessed_right = mean_at(reference, "forget.prob"), mean_at(reference, "forget.top1")
    if guess is not None:
        told += f" (never knew: {in_percent(guess)})"
    drop = difference(after, before)
    assert drop is not None
    if drop.n < s.min_facts:
        return Verdict("forgotten", "unclear", f"Too few facts for a verdict on forgetting: {told}.", keys)
    remaining, answered = left(after, before, guess), left(right, was_right, guessed_right)
    if mean_of(was_right) == 0 or max(remaining, answered) == float("inf"):
        return Verdict("forgotten", "unclear", f"The base does not know these facts: {told}.", keys)
    if drop.high >= 0 or remaining > 0.5:
        return Verdict("forgotten", "no", f"Not forgotten: {told}.", keys)
    if remaining <= s.forgotten and answered <= s.forgotten:
        return Verdict("forgotten", "yes", f"Forgotten: {told}.", keys)
    return Verdict("forgotten", "partly", f"Only partly forgotten: {told}.", keys)


def _general(edit: Measurement, base: Measurement, reference: Measurement | None, s: Standards) -> Verdict:
    """Paraphrases and other prompts, whichever brings back more; prompts alone can only find fault."""
    keys = ("paraphrase.top1", "prompts.any.top1")
    judged = [one for key in keys if (one := _elsewhere(edit, base, reference, key, s)) is not None]
    if (
        len(judged) == 2 and judged[1][0] == "unclear"
    ):  # prompts that the base cannot answer either say nothing
        judged = judged[:1]
    if not judged:
        return unmeasured("general", "Other wordings: not measured, the facts have no paraphrases.", keys)
    worst: VerdictAnswer = max((answer for answer, _ in judged), key=("yes", "unclear", "partly", "no").index)
    if worst == "yes" and edit.items("paraphrase.top1") is None:
        worst = "unclear"
    told = "; ".join(sentence for _, sentence in judged)
    words = {
        "yes": "Forgotten in other words too",
        "partly": "Partly still known in other words",
        "no": "Still known in other words",
        "unclear": "No verdict on other wordings",
    }
    evidence = tuple(key for key in keys if edit.items(key) is not None)
    return Verdict("general", worst, f"{words[worst]}: {told}.", evidence)


def _elsewhere(
    edit: Measurement, base: Measurement, reference: Measurement | None, key: str, s: Standards
) -> tuple[VerdictAnswer, str] | None:
    """How much is answered under other words of one kind; None where that was not measured."""
    right, was_right = _pair(edit, base, key)
    if right is None or was_right is None:
        return None
    change = f"{in_percent(mean_of(was_right))} → {in_percent(mean_of(right))}"
    told = (
        f"right on {change} of the paraphrases"
        if key == "paraphrase.top1"
        else f"right under at least one of many other prompts {change}"
    )
    if (guess := mean_at(reference, key)) is not None:
        told += f" (never knew: {in_percent(guess)})"
    drop = difference(right, was_right)
    assert drop is not None
    remaining = left(right, was_right, guess)
    if drop.n < s.min_facts or remaining == float("inf"):
        return "unclear", told
    if drop.high >= 0 or remaining > 0.5:
        return "no", told
    return ("yes" if remaining <= s.general else "partly"), told


def _spared(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    """Held-out facts decide, and neighbours can only make it worse; where there are no others, neighbours decide."""
    keys = ("held_out.top1", "neighbour.top1")
    judged = [
        one
        for key, what in zip(keys, ("held-out facts", "neighbours"), strict=True)
        if (one := _kept(edit, base, key, what, s)) is not None
    ]
    if not judged:
        sentence = "Other facts: not measured, there are neither held-out facts nor neighbours."
        return unmeasured("spared", sentence, keys)
    answer = judged[0][0]
    if answer == "yes" and len(judged) > 1 and judged[1][0] in ("partly", "no"):
        answer = "partly"
    words = {
        "yes": "Other facts survived",
        "partly": "Some other facts were lost",
        "no": "Other facts were lost",
        "unclear": "No verdict on other facts, too few or too close",
    }
    told = "; ".join(sentence for _, sentence in judged)
    return Verdict("spared", answer, f"{words[answer]}: {told}.", keys[: len(judged)])


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
