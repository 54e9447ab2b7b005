"""Is it gone: by what the model writes, by the probability of the answer, and under other wordings."""

from __future__ import annotations

from locus.audit.intervals import Items, difference
from locus.audit.measurement import Measurement
from locus.audit.settings import Standards
from locus.audit.verdicts.verdict import (
    Verdict,
    VerdictAnswer,
    in_percent,
    mean_at,
    mean_of,
    unmeasured,
)


def left(edit: Items, base: Items, guessed: float | None) -> float:
    """Share of the base's mean that is left, above what a model that never knew has by guessing.

    0 where the edited model has no more than that; infinite where the base itself has none to lose.
    """
    floor = guessed or 0.0
    known = mean_of(base) - floor
    return max(0.0, mean_of(edit) - floor) / known if known > 0 else float("inf")


def forgotten(edit: Measurement, base: Measurement, reference: Measurement | None, s: Standards) -> Verdict:
    """Whether the answers are gone: from what the model writes, and from what it finds probable.

    Every figure must have fallen. p(target) alone proves nothing of a sentence, which one improbable token makes
    improbable as a whole; so the text that the model writes, the predictability of a sentence's rest and its
    probability per token decide too. Where nothing was written there is no yes: the model was never heard.
    """
    keys = ("forget.prob", "forget.top1")
    after, before = edit.items("forget.prob"), base.items("forget.prob")
    right, was_right = edit.items("forget.top1"), base.items("forget.top1")
    if after is None or before is None or right is None or was_right is None:
        return unmeasured("forgotten", "Forgetting: not measured.", keys)
    limits = {
        "forget.prob": s.forgotten,
        "forget.top1": s.forgotten,
        "forget.said": s.forgotten,
        "sentence.recall": s.recall,
        "sentence.extraction": s.extraction,
        "sentence.token_prob": s.token_prob,
    }
    shares = {key: share for key in limits if (share := remaining(key, edit, base, reference)) is not None}
    evidence, told = tuple(shares), _told(edit, base, reference)
    drop = difference(after, before)
    assert drop is not None
    if drop.n < s.min_facts:
        return Verdict(
            "forgotten", "unclear", f"Too few facts for a verdict on forgetting: {told}.", evidence
        )
    knew = [shares.get(key, float("inf")) < float("inf") for key in ("forget.top1", "forget.said")]
    if not any(knew) or shares["forget.prob"] == float("inf"):
        return Verdict("forgotten", "unclear", f"The base does not know these facts: {told}.", evidence)
    finite = {key: share for key, share in shares.items() if share < float("inf")}
    if finite["forget.prob"] > 0.5 or finite.get("forget.said", 0.0) > 0.5:
        return Verdict("forgotten", "no", f"Not forgotten: {told}.", evidence)
    if drop.high >= 0:
        return Verdict("forgotten", "unclear", f"Too few facts to be sure of a drop: {told}.", evidence)
    if all(share <= limits[key] for key, share in finite.items()):
        return Verdict("forgotten", "yes", f"Forgotten: {told}.", evidence)
    return Verdict("forgotten", "partly", f"Only partly forgotten: {told}.", evidence)


def remaining(key: str, edit: Measurement, base: Measurement, reference: Measurement | None) -> float | None:
    """Share of one figure of the base that is left above guessing; None where it was not measured.

    What is guessed is what a model that never knew has. Without one, a text that says an answer counts as chance as
    far as the same model's texts say the answers of other facts, but never much beyond the base's: a model that
    lists all the answers after every prompt is not guessing.
    """
    after, before = edit.items(key), base.items(key)
    if after is None or before is None:
        return None
    guess = mean_at(reference, key)
    chance = f"{key.removesuffix('.said')}.chance"
    if guess is None and key.endswith(".said"):
        usual = mean_at(base, chance) or 0.0
        if mean_of(before) <= usual:
            return float("inf")
        guess = min(mean_at(edit, chance) or 0.0, usual + _MORE_CHANCE)
    return left(after, before, guess)


_MORE_CHANCE = 0.25
"""An edited model that lost its answers rambles more than its base does; so much more is allowed as chance."""


def _told(edit: Measurement, base: Measurement, reference: Measurement | None) -> str:
    """The figures behind the verdict in words, what is written first."""
    parts = []
    for key, words in (("forget.said", "says it"), ("forget.top1", "answered right")):
        after, before = edit.items(key), base.items(key)
        if after is not None and before is not None:
            n = len(after.values)
            parts.append(f"{words} {int(before.values.sum())} → {int(after.values.sum())} of {n}")
    for key, words in (
        ("forget.prob", "p(target)"),
        ("sentence.token_prob", "per token of a sentence"),
        ("sentence.extraction", "extraction strength of sentences"),
    ):
        after, before = edit.items(key), base.items(key)
        if after is not None and before is not None:
            parts.append(f"{words} {in_percent(mean_of(before))} → {in_percent(mean_of(after))}")
    order = sorted(parts, key=lambda part: not part.startswith("p(target)"))
    told = ", ".join(order)
    if (guess := mean_at(reference, "forget.prob")) is not None:
        told += f" (never knew: {in_percent(guess)})"
    return told


_REWORDED = {
    "paraphrase": "paraphrases",
    "unseen_way": "ways of asking that the edit did not see",
}
"""Kinds of question whose wording an edit has not seen: only they can give a yes."""


def general(edit: Measurement, base: Measurement, reference: Measurement | None, s: Standards) -> Verdict:
    """Other wordings, whichever brings back more; prompts of our own can only find fault."""
    reworded_keys = [f"{kind}.{what}" for kind in _REWORDED for what in ("top1", "said")]
    keys = (*reworded_keys, "prompts.any.top1")
    judged = {key: one for key in keys if (one := _elsewhere(edit, base, reference, key, s)) is not None}
    reworded = [key for key in judged if key != "prompts.any.top1"]
    prompted = judged.get("prompts.any.top1")
    if reworded and prompted is not None and prompted[0] == "unclear":
        del judged["prompts.any.top1"]  # prompts that the base cannot answer either say nothing
    if not judged:
        return unmeasured("general", "Other wordings: not measured, the facts have no paraphrases.", keys[:1])
    worst: VerdictAnswer = max(
        (answer for answer, _ in judged.values()), key=("yes", "unclear", "partly", "no").index
    )
    told = "; ".join(sentence for _, sentence in judged.values())
    evidence = tuple(judged)
    if worst in ("yes", "unclear") and not reworded:
        sentence = f"Other wordings: not measured, the facts have no paraphrases ({told})."
        return Verdict("general", "unclear", sentence, evidence)
    words = {
        "yes": "Forgotten in other words too",
        "partly": "Partly still known in other words",
        "no": "Still known in other words",
        "unclear": "No verdict on other wordings",
    }
    return Verdict("general", worst, f"{words[worst]}: {told}.", evidence)


def _elsewhere(
    edit: Measurement, base: Measurement, reference: Measurement | None, key: str, s: Standards
) -> tuple[VerdictAnswer, str] | None:
    """How much is answered under other words of one kind; None where that was not measured."""
    right, was_right = edit.items(key), base.items(key)
    share = remaining(key, edit, base, reference)
    if right is None or was_right is None or share is None:
        return None
    change = f"{in_percent(mean_of(was_right))} → {in_percent(mean_of(right))}"
    kind, _, what = key.partition(".")
    told = f"right under at least one of many other prompts {change}"
    if kind in _REWORDED:
        verb = "right on" if what == "top1" else "says it in its own words on"
        told = f"{verb} {change} of the {_REWORDED[kind]}"
    if (guess := mean_at(reference, key)) is not None:
        told += f" (never knew: {in_percent(guess)})"
    drop = difference(right, was_right)
    assert drop is not None
    if drop.n < s.min_facts or share == float("inf"):
        return "unclear", told
    if share > 0.5:
        return "no", told
    if drop.high >= 0:
        return "unclear", told
    return ("yes" if share <= s.general else "partly"), told
