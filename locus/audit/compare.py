"""Several edits side by side: which of them no other beats, and which one to ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locus.audit.figure import FIGURES
from locus.errors import InputError

OBJECTIVES = ("forget.prob", "paraphrase.top1", "held_out.top1", "text.kl")
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
    seconds: float | None
    on_front: bool = False
    """No other candidate is at least as good in every objective and better in one."""


@dataclass(frozen=True)
class Side:
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


def compare(audits: Mapping[str, Mapping[str, Any]]) -> Side:
    """Put the edits of several audit documents beside each other.

    Args:
        audits: Name -> document, as `locus.audit.read_audit` gives it.

    Raises:
        InputError: no audits, or audits of different base models or forget sets.
    """
    if not audits:
        raise InputError("compare: give at least one audit")
    documents = list(audits.items())
    first = documents[0][1]
    for name, doc in documents[1:]:
        _same(documents[0][0], first, name, doc)
    several = len(documents) > 1
    found = [
        _candidate(f"{audit}: {s['name']}" if several else s["name"], doc, s)
        for audit, doc in documents
        for s in doc["states"]
        if s["role"] == "edit"
    ]
    have = tuple(k for k in OBJECTIVES if all(_mean(c, k) is not None for c in found))
    front = pareto([[_score(c, key) for key in have] for c in found])
    marked = tuple(_marked(c, on) for c, on in zip(found, front, strict=True))
    recommended, why = _recommend(marked)
    missing = tuple(k for k in OBJECTIVES if k not in have)
    return Side(first["states"][0], marked, have, missing, recommended, why)


def pareto(scores: Sequence[Sequence[float]]) -> list[bool]:
    """For each row of scores (higher is better), whether no other row is as good everywhere and better somewhere."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(
            x > y for x, y in zip(a, b, strict=True)
        )

    return [not any(beats(other, row) for other in scores) for row in scores]


def _candidate(name: str, doc: Mapping[str, Any], state: Mapping[str, Any]) -> Candidate:
    verdicts = {v["question"]: v["answer"] for v in doc["verdicts"][state["name"]]}
    return Candidate(
        name, doc["headline"][state["name"]], state["figures"], state["ratios"], verdicts, state["seconds"]
    )


def _marked(c: Candidate, on_front: bool) -> Candidate:
    return Candidate(c.name, c.headline, c.figures, c.ratios, c.verdicts, c.seconds, on_front)


def _mean(c: Candidate, key: str) -> float | None:
    figure = c.figures.get(key)
    return None if figure is None else figure["mean"]


def _score(c: Candidate, key: str) -> float:
    value = _mean(c, key)
    assert value is not None
    return value if FIGURES[key].better == "higher" else -value


def _recommend(candidates: Sequence[Candidate]) -> tuple[str | None, str]:
    """Only what has forgotten and broken nothing may be shipped; among those most yes, then most kept."""
    fit = [
        c
        for c in candidates
        if c.verdicts.get("forgotten") == "yes"
        and c.verdicts.get("spared") != "no"
        and c.verdicts.get("intact") != "no"
    ]
    if not fit:
        return None, "None of them has forgotten without losing other facts or breaking the text: ship none."

    def rank(c: Candidate) -> tuple[int, bool, float]:
        kept = c.ratios.get("kept")
        points = sum(_GOOD.get(answer, 0) for answer in c.verdicts.values())
        return points, c.on_front, -1.0 if kept is None or kept["mean"] is None else kept["mean"]

    best = max(fit, key=rank)
    yes = [_WORDS[q] for q, a in best.verdicts.items() if a == "yes"]
    unmeasured = [_WORDS[q] for q, a in best.verdicts.items() if a == "not measured"]
    why = f"{best.name}: good on {', '.join(yes)}"
    weak = [_WORDS[q] for q, a in best.verdicts.items() if a in ("no", "partly")]
    why += f"; weak on {', '.join(weak)}" if weak else ""
    why += f"; not measured: {', '.join(unmeasured)}" if unmeasured else ""
    return best.name, why + "."


def _same(name: str, a: Mapping[str, Any], other: str, b: Mapping[str, Any]) -> None:
    if a["model"]["fingerprint"] != b["model"]["fingerprint"]:
        raise InputError(f"compare: {name} and {other} are audits of different base models")
    ids = [{f["id"] for f in doc["facts"] if f["group"] == "forget"} for doc in (a, b)]
    if ids[0] != ids[1]:
        raise InputError(
            f"compare: {name} and {other} are about different facts; their figures do not compare"
        )


def merge(audits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One document with the base and every edit of several audits, for one page; controls stay in their gains.

    Raises:
        InputError: as `compare`.
    """
    compare(audits)
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
        "facts": facts,
        "relations": [],
        "missing": [
            {"what": f"{name}: {m['what']}", "why": m["why"]}
            for name, doc in documents
            for m in doc["missing"]
        ],
        "seconds": sum(doc["seconds"] for _, doc in documents),
    }
