"""From figures to sentences: what an edit did, said only as far as the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from locus.audit.figure import FIGURES
from locus.audit.interval import Interval, Items, difference, gain, mean_interval, ratio
from locus.audit.measurement import Measurement

Answer = Literal["yes", "partly", "no", "unclear", "not measured"]
Outcome = Literal["better", "worse", "no difference shown", "too few facts"]


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

    question: Literal["forgotten", "general", "spared", "intact", "hidden", "returns", "localized"]
    answer: Answer
    """yes is always the good end: forgotten, spared, intact, *not* hidden, *not* returning, better than controls."""
    sentence: str
    evidence: tuple[str, ...]
    """Keys of the figures behind it."""


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
    for key in FIGURES:
        mine, theirs = edit.items(key), base.items(key)
        if mine is None:
            continue
        if theirs is not None and (d := difference(mine, theirs)) is not None:
            found.append(Comparison(key, "base", d, _outcome(key, d, standards)))
        others = [items for c in controls if (items := c.items(key)) is not None]
        if others and (d := gain(mine, others)) is not None:
            found.append(Comparison(key, "controls", d, _outcome(key, d, standards)))
    return found


def judge(
    edit: Measurement, base: Measurement, controls: Sequence[Measurement], standards: Standards
) -> tuple[Verdict, ...]:
    """Answer the seven questions about one edit."""
    forgotten = _forgotten(edit, base, standards)
    returns = _returns(edit, base, standards)
    if forgotten.answer == "no" and returns.answer != "not measured":
        returns = Verdict("returns", "unclear", "It is not gone, so it cannot come back.", returns.evidence)
    return (
        forgotten,
        _general(edit, base, standards),
        _spared(edit, base, standards),
        _intact(edit, base, standards),
        _hidden(edit, standards),
        returns,
        _localized(edit, controls, standards),
    )


def _outcome(key: str, d: Interval, standards: Standards) -> Outcome:
    if d.n < standards.min_facts:
        return "too few facts"
    if not d.excludes_zero:
        return "no difference shown"
    return "better" if (d.high < 0) == (FIGURES[key].better == "lower") else "worse"


def _forgotten(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    keys = ("forget.prob", "forget.top1")
    after, before = _pair(edit, base, "forget.prob")
    right, was_right = _pair(edit, base, "forget.top1")
    if after is None or before is None or right is None or was_right is None:
        return _unmeasured("forgotten", "Forgetting: not measured.", keys)
    n = len(right.values)
    told = (
        f"p(target) {_pct(_mean(before))} → {_pct(_mean(after))}, "
        f"answered right {int(was_right.values.sum())} → {int(right.values.sum())} of {n}"
    )
    drop = difference(after, before)
    assert drop is not None
    if drop.n < s.min_facts:
        return Verdict("forgotten", "unclear", f"Too few facts for a verdict on forgetting: {told}.", keys)
    if _mean(was_right) == 0:
        return Verdict("forgotten", "unclear", f"The base does not know these facts: {told}.", keys)
    remaining = _mean(after) / _mean(before)
    answered = _mean(right) / _mean(was_right)
    if drop.high >= 0 or remaining > 0.5:
        return Verdict("forgotten", "no", f"Not forgotten: {told}.", keys)
    if remaining <= s.forgotten and answered <= s.forgotten:
        return Verdict("forgotten", "yes", f"Forgotten: {told}.", keys)
    return Verdict("forgotten", "partly", f"Only partly forgotten: {told}.", keys)


def _general(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    keys = ("paraphrase.top1", "paraphrase.prob")
    right, was_right = _pair(edit, base, "paraphrase.top1")
    if right is None or was_right is None:
        return _unmeasured("general", "Other wordings: not measured, the facts have no paraphrases.", keys)
    told = f"right on {_pct(_mean(was_right))} → {_pct(_mean(right))} of the paraphrases"
    drop = difference(right, was_right)
    assert drop is not None
    if drop.n < s.min_facts or _mean(was_right) == 0:
        return Verdict("general", "unclear", f"No verdict on other wordings: {told}.", keys)
    remaining = _mean(right) / _mean(was_right)
    if drop.high >= 0 or remaining > 0.5:
        return Verdict("general", "no", f"Still known in other words: {told}.", keys)
    if remaining <= s.general:
        return Verdict("general", "yes", f"Forgotten in other words too: {told}.", keys)
    return Verdict("general", "partly", f"Partly still known in other words: {told}.", keys)


def _spared(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    """Held-out facts decide; neighbours, where they were measured, can only make it worse."""
    keys = ("held_out.top1", "neighbour.top1")
    judged = [
        one
        for key, what in zip(keys, ("held-out facts", "neighbours"), strict=True)
        if (one := _kept(edit, base, key, what, s)) is not None
    ]
    if not judged:
        sentence = "Other facts: not measured, there are neither held-out facts nor neighbours."
        return _unmeasured("spared", sentence, keys)
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
) -> tuple[Answer, str] | None:
    """How many right answers of one kind are left; None where that was not measured."""
    after, before = _pair(edit, base, key)
    if after is None or before is None:
        return None
    told = f"{what} right {_pct(_mean(before))} → {_pct(_mean(after))}"
    kept, drop = ratio(after, before), difference(after, before)
    if kept is None or drop is None or drop.n < s.min_facts:
        return "unclear", told
    if _mean(before) < 0.995:
        told += f", {_pct(kept.mean)} as often as before"
    if kept.mean >= s.spared and kept.low >= s.spared_low:
        return "yes", told
    if drop.high >= 0:
        return "unclear", told
    return ("no" if kept.mean < s.spared_low else "partly"), told


def _intact(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    keys = ("text.kl", "text.nll")
    if edit.text is None or base.text is None:
        return _unmeasured("intact", "Neutral text: not measured, no text was given.", keys)
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


def _hidden(edit: Measurement, s: Standards) -> Verdict:
    keys = ("lens.top10", "lens.bottom10")
    share = mean_interval(items) if (items := edit.items("lens.top10")) is not None else None
    if share is None:
        return _unmeasured("hidden", "Inner layers: not measured.", keys)
    told = f"{_pct(share.mean)} of the answers are in some layer's top 10"
    if share.n < s.min_facts:
        return Verdict("hidden", "unclear", f"No verdict on inner layers: {told}.", keys)
    if share.mean <= s.hidden:
        return Verdict("hidden", "yes", f"Not readable inside by the logit lens: {told}.", keys)
    if share.low > s.hidden:
        return Verdict("hidden", "no", f"Still readable inside: {told}.", keys)
    return Verdict("hidden", "partly", f"Some answers are readable inside: {told}.", keys)


def _returns(edit: Measurement, base: Measurement, s: Standards) -> Verdict:
    found = {"relearn.prob": recovered(edit, base)}
    found |= {f"{fmt}.forget.prob": _rounding_return(edit, base, fmt) for fmt in ("bfloat16", "int8", "int4")}
    attacks = {key: share for key, share in found.items() if share is not None}
    keys = tuple(key for key in found if edit.items(key) is not None)
    if not keys:
        return _unmeasured("returns", "Relearning and rounding: not measured.", tuple(found))
    if not attacks:
        return Verdict("returns", "unclear", "Nothing was removed, so nothing can come back.", keys)
    names = {"relearn.prob": "relearning half of the facts brings back {} of the other half"}
    told = "; ".join(
        names.get(key, f"{key.split('.')[0]} rounding {{}}").format(_pct(min(1.0, max(0.0, share.mean))))
        for key, share in attacks.items()
    )
    if min(share.n for share in attacks.values()) < min(4, s.min_facts):
        return Verdict("returns", "unclear", f"Too few facts to say whether it comes back: {told}.", keys)
    back = [share.mean for share in attacks.values() if share.mean > s.recovered and share.low > 0]
    if back:
        answer: Answer = "no" if max(back) > 0.5 else "partly"
        return Verdict("returns", answer, f"It comes back under attack: {told}.", keys)
    if all(share.mean <= s.recovered for share in attacks.values()):
        return Verdict("returns", "yes", f"It does not come back: {told}.", keys)
    return Verdict(
        "returns", "unclear", f"The intervals are too wide to say whether it comes back: {told}.", keys
    )


def recovered(edit: Measurement, base: Measurement) -> Interval | None:
    """Share of what the edit took from the untaught half that relearning gave back, per unit of p(target)."""
    curve, known = edit.relearning, base.answers.get("forget")
    if curve is None or known is None:
        return None
    before = dict(zip(known.facts, known.prob.values, strict=True))
    start = curve.tested_prob[0]
    lost = Items(curve.tested, start.new_tensor([float(before[f]) for f in curve.tested]) - start)
    return ratio(Items(curve.tested, curve.tested_prob[-1] - start), lost)


def _rounding_return(edit: Measurement, base: Measurement, fmt: str) -> Interval | None:
    """Share of the removed p(target) that rounding gives back, beside the equally rounded base."""
    wanted = (
        (edit, f"{fmt}.forget.prob"),
        (edit, "forget.prob"),
        (base, f"{fmt}.forget.prob"),
        (base, "forget.prob"),
    )
    items = [m.items(key) for m, key in wanted]
    if any(one is None for one in items):
        return None
    rounded, plain, rounded_base, plain_base = (one.values.double() for one in items if one is not None)
    if plain_base.mean() <= 0 or rounded_base.mean() <= 0:
        return None
    harm = rounded_base.mean() / plain_base.mean()
    groups = edit.answers["forget"].facts
    return ratio(Items(groups, rounded - harm * plain), Items(groups, harm * (plain_base - plain)))


def _localized(edit: Measurement, controls: Sequence[Measurement], s: Standards) -> Verdict:
    keys = (
        "forget.prob", "paraphrase.top1", "held_out.top1", "neighbour.top1", "text.kl", "lens.top10", "relearn.prob",
    )  # fmt: skip
    if not controls:
        sentence = "Location: not measured, no control edits with random masks were given."
        return _unmeasured("localized", sentence, keys)
    wins, losses, seen = [], [], False
    for key in keys:
        others = [items for c in controls if (items := c.items(key)) is not None]
        mine = edit.items(key)
        if mine is None or not others or (d := gain(mine, others)) is None:
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


def _pair(edit: Measurement, base: Measurement, key: str) -> tuple[Items | None, Items | None]:
    return edit.items(key), base.items(key)


def _mean(items: Items) -> float:
    return float(items.values.double().mean())


def _pct(value: float) -> str:
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return f"{100 * value:.1f} %" if 0 < abs(value) < 0.095 else f"{100 * value:.0f} %"


def _unmeasured(question: str, sentence: str, keys: tuple[str, ...]) -> Verdict:
    return Verdict(question, "not measured", sentence, keys)  # type: ignore[arg-type]
