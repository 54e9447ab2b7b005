"""Several edits side by side: which of them no other beats, and which one to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from locus.audit.metric_table import FIGURES
from locus.errors import InputError
from locus.input_digest import differing

COMPARED_FIGURES = ("forget.prob", "paraphrase.top1", "held_out.top1", "text.kl")
"""Figures that the Pareto front is taken over."""

_GOOD = {"yes": 2, "partly": 1}
_WORDS = {
    "forgotten": "forgetting",
    "general": "other wordings",
    "spared": "sparing other facts",
    "intact": "neutral text",
    "hidden": "inner layers",
    "returns": "staying away under attack",
    "localized": "the comparison with random masks",
}


@dataclass(frozen=True)
class Candidate:
    """One edit of one audit."""

    name: str
    """The edit's name, with its audit's where several audits have it."""
    headline: str
    figures: Mapping[str, Mapping[str, Any] | None]
    ratios: Mapping[str, Mapping[str, Any] | None]
    verdicts: Mapping[str, str]
    """Question -> answer."""
    sentences: Mapping[str, str]
    """Question -> what was found."""
    seconds: float | None
    on_front: bool = False
    """No other candidate is at least as good in every objective and better in one."""


@dataclass(frozen=True)
class EditsCompared:
    """Candidates beside each other."""

    base: Mapping[str, Any]
    """The base's state, from the first audit."""
    candidates: tuple[Candidate, ...]
    objectives: tuple[str, ...]
    """Those of the objectives that every candidate has."""
    missing: tuple[str, ...]
    """Those that some candidate lacks: they take no part in the front."""
    recommended: str | None
    """Name of the edit to ship; None where none has forgotten without breaking."""
    why: str
    """The reason in one sentence."""
    flaws: tuple[str, ...]
    """What is wrong with the recommended one, or with the least bad where none is recommended."""
    others: Mapping[str, str]
    """Name of each edit that is not recommended -> why not."""
    unequal: tuple[str, ...] = ()
    """What some of the audits asked otherwise than the first one, so that their figures do not quite compare."""


def compare(audits: Mapping[str, Mapping[str, Any]]) -> EditsCompared:
    """Put the edits of several audit documents beside each other.

    Args:
        audits: Name -> document, as `locus.audit.read_audit` gives it.

    Raises:
        InputError: no audits, or audits of different base models, forget facts, dtypes or forms.
    """
    if not audits:
        raise InputError("compare: give at least one audit")
    documents = list(audits.items())
    first = documents[0][1]
    for name, doc in documents[1:]:
        _same(documents[0][0], first, name, doc)
    unequal = tuple(
        line for name, doc in documents[1:] for line in _unequal(documents[0][0], first, name, doc)
    )
    several = len(documents) > 1
    found = [
        _candidate(f"{audit}: {s['name']}" if several else s["name"], doc, s)
        for audit, doc in documents
        for s in doc["states"]
        if s["role"] == "edit"
    ]
    have = tuple(k for k in COMPARED_FIGURES if all(_mean(c, k) is not None for c in found))
    front = pareto([[_score(c, key) for key in have] for c in found])
    marked = tuple(replace(c, on_front=on) for c, on in zip(found, front, strict=True))
    best, fit, why = _recommend(marked)
    missing = tuple(k for k in COMPARED_FIGURES if k not in have)
    others = {c.name: _why_not(c, best if fit else None) for c in marked if c is not best or not fit}
    return EditsCompared(
        first["states"][0],
        marked,
        have,
        missing,
        best.name if fit else None,
        why,
        tuple(_flaws(best)),
        others,
        unequal,
    )


def pareto(scores: Sequence[Sequence[float]]) -> list[bool]:
    """For each row of scores (higher is better), whether no other row is as good everywhere and better somewhere."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(
            x > y for x, y in zip(a, b, strict=True)
        )

    return [not any(beats(other, row) for other in scores) for row in scores]


def _candidate(name: str, doc: Mapping[str, Any], state: Mapping[str, Any]) -> Candidate:
    said = doc["verdicts"][state["name"]]
    return Candidate(
        name,
        doc["headline"][state["name"]],
        state["figures"],
        state["ratios"],
        {v["question"]: v["answer"] for v in said},
        {v["question"]: v["sentence"] for v in said},
        state["seconds"],
    )


def _mean(c: Candidate, key: str) -> float | None:
    figure = c.figures.get(key)
    return None if figure is None else figure["mean"]


def _score(c: Candidate, key: str) -> float:
    value = _mean(c, key)
    assert value is not None
    return value if FIGURES[key].better == "higher" else -value


def _may_ship(c: Candidate) -> bool:
    """Only what has forgotten, in other words too as far as known, and was seen to have lost and broken nothing."""
    gone = c.verdicts.get("forgotten") == "yes" and c.verdicts.get("general") != "no"
    return gone and not {"no", "not measured"} & {
        c.verdicts.get("spared", "not measured"),
        c.verdicts.get("intact", "not measured"),
    }


def _recommend(candidates: Sequence[Candidate]) -> tuple[Candidate, bool, str]:
    """The best one, whether it may be shipped, and why: among those that may, most yes, then most kept."""

    def rank(c: Candidate) -> tuple[bool, int, bool, float]:
        kept = c.ratios.get("kept")
        points = sum(
            _GOOD.get(answer, 0) for question, answer in c.verdicts.items() if question != "localized"
        )
        return (
            _may_ship(c),
            points,
            c.on_front,
            -1.0 if kept is None or kept["mean"] is None else kept["mean"],
        )

    best = max(candidates, key=rank)
    if not _may_ship(best):
        why = "None of them was seen to forget and to leave other facts and neutral text whole: ship none."
        return best, False, f"{why} The least bad is {best.name}: {_blame(best)}."
    good = [_WORDS[q] for q, a in best.verdicts.items() if a == "yes"]
    why = f"{best.name}: good on {', '.join(good)}"
    for answer, words in (("no", "fails on"), ("partly", "weak on"), ("unclear", "no verdict on")):
        found = [_WORDS[q] for q, a in best.verdicts.items() if a == answer and q != "localized"]
        why += f"; {words} {', '.join(found)}" if found else ""
    unmeasured = [_WORDS[q] for q in _WORDS if best.verdicts.get(q, "not measured") == "not measured"]
    why += f"; not measured: {', '.join(unmeasured)}" if unmeasured else ""
    return best, True, why + "."


def _flaws(c: Candidate) -> list[str]:
    """What was found wrong with an edit, or not looked at, in the audit's own sentences."""
    answers = ("no", "partly", "not measured")
    return [
        c.sentences[q] for a in answers for q, found in c.verdicts.items() if found == a and q != "localized"
    ]


def _blame(c: Candidate) -> str:
    """Why an edit may not be shipped: the verdicts that forbid it."""
    said = [c.sentences.get(q, "") for q in ("forgotten", "general", "spared", "intact")
            if (q != "general" or c.verdicts.get(q) == "no")
            and c.verdicts.get(q, "not measured") in ("no", "partly", "unclear", "not measured")
            and not (q != "forgotten" and c.verdicts.get(q) in ("partly", "unclear"))]  # fmt: skip
    return " ".join(said).rstrip(".") or "not judged"


def _why_not(c: Candidate, best: Candidate | None) -> str:
    """Why this edit is not the one."""
    if not _may_ship(c) or best is None:
        return f"{_blame(c)}."
    behind = [
        q
        for q, answer in best.verdicts.items()
        if _GOOD.get(answer, 0) > _GOOD.get(c.verdicts.get(q, ""), 0) and q != "localized"
    ]
    if behind:
        found = " ".join(c.sentences[q] for q in behind if q in c.sentences)
        words = ", ".join(_WORDS[q] for q in behind)
        return f"It may be shipped, but {best.name} is better on {words}. {found}".strip()
    return f"It may be shipped; {best.name} kept as much or more of the other facts."


def _same(name: str, a: Mapping[str, Any], other: str, b: Mapping[str, Any]) -> None:
    """Refuse audits whose figures are not of the same things."""
    if a["model"]["fingerprint"] != b["model"]["fingerprint"]:
        raise InputError(f"compare: {name} and {other} are audits of different base models")
    asked = [
        {f["id"]: (f.get("prompt"), f.get("target")) for f in doc["facts"] if f["group"] == "forget"}
        for doc in (a, b)
    ]
    if asked[0].keys() != asked[1].keys():
        raise InputError(
            f"compare: {name} and {other} are about different facts; their figures do not compare"
        )
    for fact, question in asked[0].items():
        if question != asked[1][fact]:
            raise InputError(
                f"compare: {name} asks fact {fact!r} otherwise than {other}: {question!r}, {asked[1][fact]!r}; "
                f"audit both with one fact file"
            )
    for field, words in (("dtype", "in"), ("chat", "with chat form"), ("bos", "with first token")):
        ours, theirs = (doc["model"].get(field) for doc in (a, b))
        if ours != theirs and field in a["model"] and field in b["model"]:
            raise InputError(
                f"compare: {name} was audited {words} {ours}, {other} {words} {theirs}; audit both alike"
            )


def _unequal(name: str, a: Mapping[str, Any], other: str, b: Mapping[str, Any]) -> list[str]:
    """What the second audit asked otherwise than the first, of what does not forbid to set them side by side."""
    if not a.get("inputs") or not b.get("inputs"):
        older = other if a.get("inputs") else name
        return [f"{older} does not say all that it asked (an earlier version wrote it)"]
    changed = differing(a["inputs"], b["inputs"])
    return [f"{other} differs from {name} in {', '.join(changed)}"] if changed else []


def merge(audits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One document with the base and every edit of several audits, for one page; controls stay in their gains.

    Raises:
        InputError: as `compare`.
    """
    side = compare(audits)
    documents = list(audits.items())
    first = documents[0][1]
    if len(documents) == 1:
        return dict(first)
    states, comparisons = [first["states"][0]], []
    verdicts: dict[str, Any] = {}
    headlines: dict[str, str] = {}
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for audit, doc in documents:
        edits = [s for s in doc["states"] if s["role"] == "edit"]
        new = {s["name"]: f"{audit}: {s['name']}" if len(edits) > 1 else audit for s in edits}
        states += [{**s, "name": new[s["name"]]} for s in edits]
        comparisons += [{**c, "edit": new[c["edit"]]} for c in doc["comparisons"]]
        verdicts |= {new[name]: v for name, v in doc["verdicts"].items()}
        headlines |= {new[name]: line for name, line in doc["headline"].items()}
        for fact in doc["facts"]:
            renamed = {new[name]: answer for name, answer in fact["states"].items() if name in new}
            answers.setdefault((fact["group"], fact["id"]), {}).update(renamed)
    names = [s["name"] for s in states[1:]]
    facts = [
        {**f, "states": {first["states"][0]["name"]: f["states"][first["states"][0]["name"]], **given}}
        for f in first["facts"]
        if set(given := answers[f["group"], f["id"]]) == set(names)
    ]
    return {
        **first,
        "states": states,
        "comparisons": comparisons,
        "verdicts": verdicts,
        "headline": headlines,
        "notes": [
            *(f"{name}: {note}" for name, doc in documents for note in doc.get("notes", ())),
            *(f"Not asked alike: {line}." for line in side.unequal),
        ],
        "facts": facts,
        "relations": [],
        "missing": [
            {"what": f"{name}: {m['what']}", "why": m["why"]}
            for name, doc in documents
            for m in doc["missing"]
        ],
        "seconds": sum(doc["seconds"] for _, doc in documents),
    }
