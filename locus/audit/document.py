"""An audit as one JSON document: the only thing that reports, gates and comparisons read.

SCHEMA.md beside this file says what each field is; a test holds the two together. Fields are only ever added; a
changed meaning raises the version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from locus.audit.findings import Findings
from locus.audit.intervals import Interval, Items, difference, mean_interval, ratio
from locus.audit.measurement import Measurement
from locus.audit.metric_table import FIGURES, figure_of
from locus.audit.questions import QUESTION_KINDS
from locus.audit.verdicts.controls import SAME_SIZE, compare_states, size_ratio
from locus.audit.verdicts.judgement import judge
from locus.audit.verdicts.resistance import recovered
from locus.audit.verdicts.verdict import NOT_NEXT_DOOR, Verdict

SCHEMA = 1


def document(audit: Findings) -> dict[str, Any]:
    """The audit as plain JSON values, every interval computed."""
    base, standards = audit.base, audit.settings.standards
    controls = {edit.name: _of_equal_size(audit, edit) for edit in audit.edits}
    verdicts = {
        edit.name: judge(edit, base, controls[edit.name], standards, audit.reference) for edit in audit.edits
    }
    return {
        "schema": SCHEMA,
        "model": dict(audit.model),
        "settings": audit.settings.to_json(),
        "inputs": dict(audit.inputs),
        "notes": list(audit.notes),
        "data": {kind: len(audit.questions.get(kind, ())) for kind in QUESTION_KINDS}
        | {"text_tokens": _tokens(base)},
        "metrics": _metrics(_keys(audit)),
        "states": [_state(one, audit) for one in audit.measurements],
        "comparisons": [
            {
                "edit": edit.name,
                "key": c.key,
                "against": c.against,
                "outcome": c.outcome,
                **(interval_json(c.difference) or {}),
            }
            for edit in audit.edits
            for c in compare_states(edit, base, controls[edit.name], standards)
        ],
        "verdicts": {
            name: [asdict(v) | {"evidence": list(v.evidence)} for v in vs] for name, vs in verdicts.items()
        },
        "headline": {name: headline(vs) for name, vs in verdicts.items()},
        "facts": _facts(audit),
        "relations": _relations(audit),
        "missing": [*(dict(one) for one in audit.missing), *_unequal(audit)],
        "versions": dict(audit.versions),
        "seconds": rounded(audit.seconds),
    }


def _of_equal_size(audit: Findings, edit: Measurement) -> list[Measurement]:
    """The controls that an edit may be compared with."""
    return [c for c in audit.controls if abs(_size_ratio(audit, edit, c) - 1) <= SAME_SIZE]


def _size_ratio(audit: Findings, edit: Measurement, control: Measurement) -> float:
    return size_ratio(audit.changes[edit.name], audit.changes[control.name])


def _size_ratios(audit: Findings, control: Measurement) -> dict[str, float | None]:
    return {edit.name: rounded(_size_ratio(audit, edit, control)) for edit in audit.edits}


def _unequal(audit: Findings) -> list[dict[str, str]]:
    """Controls that an edit is not compared with, and why."""
    return [
        {
            "what": f"{control.name} beside {edit.name}",
            "why": f"it has {ratio_:.3g} times as many weights, so it is no control of equal size",
        }
        for edit in audit.edits
        for control in audit.controls
        if abs((ratio_ := _size_ratio(audit, edit, control)) - 1) > SAME_SIZE
    ]


def headline(verdicts: Sequence[Verdict]) -> str:
    """One line: what was forgotten, what survived, what broke, what leaks."""
    said: dict[str, str] = {v.question: v.answer for v in verdicts}
    words = {
        "forgotten": {"yes": "Forgotten", "partly": "Only partly forgotten", "no": "Not forgotten"},
        "hidden": {
            "yes": "erased from inner layers, as far as the lens sees",
            "partly": "partly only hidden, some inner layers still show it",
            "no": "but only hidden, inner layers still show it",
        },
        "general": {
            "yes": "in other wordings too",
            "partly": "some wordings still get it",
            "no": "other wordings still get it",
        },
        "spared": {
            "yes": "other facts survive",
            "partly": "some other facts are lost",
            "no": "other facts are lost",
        },
        "intact": {
            "yes": "neutral text reads as before",
            "partly": "neutral text reads differently",
            "no": "the model is broken",
        },
        "returns": {
            "yes": "stays away under attack",
            "partly": "partly comes back under attack",
            "no": "comes back under attack",
        },
    }
    missing = {"unclear": "no verdict on {}", "not measured": "{} not measured"}
    names = {
        "forgotten": "forgetting",
        "general": "other wordings",
        "spared": "other facts",
        "intact": "neutral text",
        "hidden": "inner layers",
        "returns": "attacks",
    }
    parts = []
    for question, answers in words.items():
        answer = said.get(question, "not measured")
        if question in ("general", "hidden", "returns") and said.get("forgotten") == "no":
            continue
        if answer in answers:
            parts.append(answers[answer])
        elif answer in missing:
            parts.append(missing[answer].format(names[question]))
        if question == "spared" and any(NOT_NEXT_DOOR in v.sentence for v in verdicts):
            parts.append("facts next door not measured")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def interval_json(interval: Interval | None) -> dict[str, Any] | None:
    """An interval as JSON; None where there is nothing, "finite": false where it is not a number."""
    if interval is None:
        return None
    numbers = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    out: dict[str, Any] = {k: rounded(v) for k, v in numbers.items()} | {
        "n": interval.n,
        "n_items": interval.n_items,
    }
    return out if all(math.isfinite(v) for v in numbers.values()) else out | {"finite": False}


def rounded(value: float) -> float | None:
    """Six significant digits; None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _tokens(base: Measurement) -> int:
    return 0 if base.text is None else len(base.text.paragraphs)


def _keys(audit: Findings) -> tuple[str, ...]:
    """Every figure of the table, and those of tasks that only this audit has."""
    further = {key for m in audit.measurements for key in (*m.extra, *m.scalars)} - set(FIGURES)
    return (*FIGURES, *sorted(further))


def _metrics(keys: Sequence[str]) -> dict[str, Any]:
    return {
        f.key: {
            "label": f.label,
            "section": f.section,
            "better": f.better,
            "unit": f.unit,
            "definition": f.definition,
        }
        for f in map(figure_of, keys)
    }


def _state(one: Measurement, audit: Findings) -> dict[str, Any]:
    figures = {
        key: interval_json(_mean(one.items(key), figure_of(key).unit == "share")) for key in _keys(audit)
    }
    for key, value in one.scalars.items():
        figures[key] = {"mean": rounded(value), "low": None, "high": None, "n": None, "n_items": None}
    change = audit.changes.get(one.name)
    return {
        "name": one.name,
        "role": one.role,
        "figures": figures,
        "ratios": {} if one.role == "base" else _ratios(one, audit.base),
        "curves": _curves(one, audit.settings.lens_k),
        "change": None if change is None else change.to_json(),
        "seconds": rounded(one.seconds),
        "processor_seconds": rounded(one.processor_seconds),
    } | ({} if one.role != "control" else {"size_ratio": _size_ratios(audit, one)})


def _mean(items: Items | None, share: bool = True) -> Interval | None:
    return None if items is None else mean_interval(items, share=share)


def _ratios(one: Measurement, base: Measurement) -> dict[str, Any]:
    """Figures beside the base's."""

    def beside(key: str) -> Interval | None:
        mine, theirs = one.items(key), base.items(key)
        return None if mine is None or theirs is None else ratio(mine, theirs)

    perplexity = None
    if one.text is not None and base.text is not None:
        rise = difference(one.text.nll_items, base.text.nll_items, share=False)
        if rise is not None:
            mean, low, high = (
                math.exp(min(x, 700.0)) if math.isfinite(x) else math.inf
                for x in (rise.mean, rise.low, rise.high)
            )
            perplexity = Interval(mean, low, high, rise.n, rise.n_items)
    found = {
        "remaining": beside("forget.prob"),
        "kept": beside("held_out.top1"),
        "perplexity": perplexity,
        "recovered": recovered(one, base),
    }
    return {name: interval_json(interval) for name, interval in found.items()}


def _curves(one: Measurement, ks: Sequence[int]) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    if (leak := one.lens) is not None:
        curves["lens"] = {
            "n": len(leak.facts),
            "prob": _list(leak.prob.double().mean(0)),
            "k": {
                str(k): {
                    "top": _list(leak.top(k).double().mean(0)),
                    "bottom": _list(leak.bottom(k).double().mean(0)),
                }
                for k in ks
            },
        }
    if (curve := one.relearning) is not None:
        bands = [mean_interval(curve.tested_items(i)) for i in range(len(curve.steps))]
        curves["relearn"] = {
            "steps": list(curve.steps),
            "taught": _list(curve.taught_prob.double().mean(1)),
            "tested": [interval_json(band) for band in bands],
            "tested_top1": _list(curve.tested_correct.double().mean(1)),
            "n_taught": len(curve.taught),
            "n": len(curve.tested),
        }
    for name, further in one.curves.items():
        curves[name] = {
            "over": further.over,
            "xs": list(further.xs),
            "values": [interval_json(_mean(items, name != "depth")) for items in further.at],
        }
    return curves


def _list(values: Tensor) -> list[float | None]:
    return [rounded(float(v)) for v in values]


def _facts(audit: Findings) -> list[dict[str, Any]]:
    """Each forgotten, held-out and retained fact in every state."""
    rows = []
    for group in ("forget", "held_out", "retained"):
        asked = audit.questions.get(group)
        if asked is None:
            continue
        for i, (fact, example) in enumerate(zip(asked.facts, asked.examples, strict=True)):
            row: dict[str, Any] = {
                "id": fact,
                "group": group,
                "prompt": example.prompt,
                "target": example.target,
                "states": {m.name: _answer(m, group, i) for m in audit.measurements},
            }
            if group == "forget":
                for m in audit.measurements:
                    row["states"][m.name] |= _forget_detail(m, fact, i)
            rows.append(row)
    return rows


def _relations(audit: Findings) -> list[dict[str, Any]]:
    """Held-out facts by relation, those that share one with a forget fact first: the drawdown."""
    asked = audit.questions.get("held_out")
    if asked is None:
        return []
    forgotten = {audit.relations.get(fact) for fact in audit.questions["forget"].facts}
    members: dict[str, list[int]] = {}
    for i, fact in enumerate(asked.facts):
        if fact in audit.relations:
            members.setdefault(audit.relations[fact], []).append(i)
    rows = [
        {
            "relation": relation,
            "near": relation in forgotten,
            "n": len(rows),
            "states": {
                m.name: rounded(float(m.answers["held_out"].correct[rows].double().mean()))
                for m in audit.measurements
            },
        }
        for relation, rows in members.items()
    ]
    return sorted(rows, key=lambda row: (not row["near"], row["relation"]))


def _answer(m: Measurement, group: str, i: int) -> dict[str, Any]:
    answers = m.answers[group]
    return {"prob": rounded(math.exp(-float(answers.nll[i]))), "correct": bool(answers.correct[i])}


def _forget_detail(m: Measurement, fact: str, i: int) -> dict[str, Any]:
    detail: dict[str, Any] = {}
    if m.written:
        detail["written"] = m.written[i]
        said = m.items("forget.said")
        detail["said"] = None if said is None else bool(said.values[i])
    if (others := m.answers.get("paraphrase")) is not None:
        right = [bool(c) for f, c in zip(others.facts, others.correct, strict=True) if f == fact]
        detail["paraphrases"] = {"right": sum(right), "of": len(right)}
    if m.lens is not None:
        detail["lens_best_rank"] = int(m.lens.rank[i].min())
        detail["lens_rank"] = m.lens.rank[i].tolist()
    if m.relearning is not None and fact in m.relearning.tested:
        where = m.relearning.tested.index(fact)
        detail["relearned_prob"] = rounded(float(m.relearning.tested_prob[-1, where]))
    return detail


def figure(doc: Mapping[str, Any], state: str, key: str) -> dict[str, Any] | None:
    """One figure of a document by state and key; None where it was not measured."""
    for one in doc["states"]:
        if one["name"] == state:
            found: dict[str, Any] | None = one["figures"].get(key)
            return found
    return None
