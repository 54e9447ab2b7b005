"""An audit document turned into what its page shows: rows, cells, charts. No HTML here, no arithmetic there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locus.audit.metric_table import FIGURES
from locus.report.page import number, percent, span

QUESTION_LABELS = {
    "forgotten": "Forgotten?",
    "hidden": "Erased, not only hidden?",
    "general": "In other words too?",
    "spared": "Other facts spared?",
    "intact": "Neutral text unharmed?",
    "returns": "Does it stay away?",
    "localized": "Did the place matter?",
}
_TONES = {"yes": "good", "partly": "warn", "no": "bad", "unclear": "none", "not measured": "none"}

SECTIONS = {
    "forgotten": "What had to go (lower is better)",
    "general": "The same in other words (lower is better)",
    "spared": "What had to stay (higher is better)",
    "intact": "Neutral text (lower is better)",
    "hidden": "Readable in inner layers (lower is better)",
    "returns": "After an attack",
    "suites": "Benchmark suites",
}
N_COLOURS = 6
"""Colours that edits have in the style sheet."""
_ALWAYS = (
    "forget.said",
    "forget.prob",
    "forget.top1",
    "unseen_way.said",
    "unseen_way.top1",
    "paraphrase.said",
    "paraphrase.top1",
    "same_subject.top1",
    "same_relation.top1",
    "held_out.top1",
    "neighbour.top1",
    "retained.top1",
    "text.kl",
    "text.nll",
    "lens.top10",
    "lens.bottom10",
    "relearn.prob",
    "int8.forget.prob",
    "int4.forget.prob",
)
"""Figures that the main table shows even where they are missing, as missing."""
_DETAILS = (
    "forget.nll",
    "forget.chance",
    "forget.token_prob",
    "paraphrase.chance",
    "unseen_way.chance",
    "paraphrase.prob",
    "held_out.prob",
    "lens.top4",
    "lens.bottom4",
    "bfloat16.forget.prob",
    "int4.held_out.top1",
    "generation.exact",
    "depth.drop",
)
"""Figures that only the full table shows."""
_OUTCOMES = {"better": ("good", "▲"), "worse": ("bad", "▼"), "no difference shown": ("none", "≈")}


@dataclass(frozen=True)
class TableCell:
    """One figure in the table."""

    value: str
    """Empty where it was not measured."""
    range: str
    """Its interval, and n."""
    hover: str
    css: str = ""


@dataclass(frozen=True)
class TableRow:
    """One figure in every state."""

    label: str
    definition: str
    cells: Sequence[TableCell]
    gains: Sequence[TableCell]
    """Against the controls, one for each edit; empty cells where there is none."""


@dataclass(frozen=True)
class Section:
    """Rows that answer one question."""

    title: str
    rows: Sequence[TableRow]


def state_css(doc: Mapping[str, Any]) -> dict[str, str]:
    """The colour class of each state."""
    css, n_edits = {}, 0
    for state in doc["states"]:
        if state["role"] == "edit":
            css[state["name"]] = f"s-edit{n_edits % N_COLOURS}"
            n_edits += 1
        else:
            css[state["name"]] = {"base": "s-base", "control": "s-control"}.get(state["role"], "s-reference")
    return css


def verdict_rows(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Question, answer, colour and sentence of each verdict."""
    return [
        {
            "question": QUESTION_LABELS[v["question"]],
            "answer": v["answer"],
            "tone": _TONES[v["answer"]],
            "sentence": v["sentence"],
        }
        for v in verdicts
    ]


def matrix(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each question with the answers of all edits, for the page of several."""
    edits = [s["name"] for s in doc["states"] if s["role"] == "edit"]
    said = {edit: {v["question"]: v for v in doc["verdicts"][edit]} for edit in edits}
    return [
        {
            "question": text,
            "cells": [
                {"answer": v["answer"], "tone": _TONES[v["answer"]], "sentence": v["sentence"]}
                for edit in edits
                for v in [said[edit].get(question, {"answer": "not measured", "sentence": ""})]
            ],
        }
        for question, text in QUESTION_LABELS.items()
    ]


def columns(
    doc: Mapping[str, Any], everything: bool = False
) -> list[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """Title, colour and states of each column: one a state, but all controls together unless everything is shown."""
    css = state_css(doc)
    controls = [s for s in doc["states"] if s["role"] == "control"]
    found: list[tuple[str, str, Sequence[Mapping[str, Any]]]] = []
    for state in doc["states"]:
        if everything or len(controls) < 2 or state["role"] != "control":
            found.append((state["name"], css[state["name"]], [state]))
        elif state is controls[0]:
            found.append((f"{len(controls)} controls", css[state["name"]], controls))
    return found


def table(doc: Mapping[str, Any], everything: bool = False) -> list[Section]:
    """The figures by section; the main ones, or all that were measured in some state."""
    edits = [s["name"] for s in doc["states"] if s["role"] == "edit"]
    sections: dict[str, list[TableRow]] = {}
    for key in _ordered(doc["metrics"]):
        metric = doc["metrics"][key]
        measured = any(state["figures"].get(key) is not None for state in doc["states"])
        if (not measured and (everything or key not in _ALWAYS)) or (key in _DETAILS and not everything):
            continue
        cells = [
            _cell(doc, states[0], key) if len(states) == 1 else _together(doc, states, key)
            for _, _, states in columns(doc, everything)
        ]
        gains = [_gain(doc, edit, key) for edit in edits]
        label = "perplexity on neutral text" if key == "text.nll" else metric["label"]
        row = TableRow(label, metric["definition"], cells, gains)
        sections.setdefault(metric["section"], []).append(row)
    order = [*SECTIONS, *(name for name in sections if name not in SECTIONS)]
    return [Section(SECTIONS.get(name, name), sections[name]) for name in order if name in sections]


def _ordered(keys: Iterable[str]) -> list[str]:
    """Figures in the table's own order; those of a newer locus behind."""
    place = {key: i for i, key in enumerate(FIGURES)}
    return sorted(keys, key=lambda key: place.get(key, len(place)))


def shown(doc: Mapping[str, Any], key: str, value: float | None) -> str:
    """A figure's value in its unit; the NLL of text as the perplexity it stands for."""
    if value is None:
        return "not finite"
    if key == "text.nll":
        return number(math.exp(min(value, 700.0)))
    return percent(value) if doc["metrics"][key]["unit"] == "share" else number(value)


def _cell(doc: Mapping[str, Any], state: Mapping[str, Any], key: str) -> TableCell:
    figure = state["figures"].get(key)
    css = "edit" if state["role"] == "edit" else ""
    if figure is None:
        if state["role"] == "control" and doc["states"][1]["figures"].get(key) is not None:
            return TableCell("", "", "The controls did not go through this attack (--control-attacks).", css)
        if state["role"] == "base" and key.startswith("relearn."):
            return TableCell("", "", "Nothing was removed from it that could come back.", css)
        return TableCell("", "not measured", "Not measured: no evidence, which is not a pass.", css)
    if key == "text.kl" and state["role"] == "base":
        return TableCell("0", "", "The base beside itself.", css)
    if figure["n"] is None:
        definition = doc["metrics"][key]["definition"]
        return TableCell(shown(doc, key, figure["mean"]), "one number for the whole set", definition, css)
    ends = "" if "finite" in figure else span(*(shown(doc, key, figure[end]) for end in ("low", "high")))
    metric = doc["metrics"][key]
    facts = "paragraphs" if key.startswith("text.") else "facts"
    hover = f"{metric['definition']} 95 % interval {ends}; n = {figure['n']} {facts}"
    hover += f", {figure['n_items']} items." if figure["n_items"] != figure["n"] else "."
    return TableCell(
        shown(doc, key, figure["mean"]), f"{ends} · n {figure['n']}", f"{state['name']}: {hover}", css
    )


def _together(doc: Mapping[str, Any], states: Sequence[Mapping[str, Any]], key: str) -> TableCell:
    """One figure of several controls: the mean of their means, and how far they differ."""
    figures = [f for state in states if (f := state["figures"].get(key)) is not None]
    means = [f["mean"] for f in figures]
    if not figures:
        return _cell(doc, states[0], key)
    if None in means:
        return TableCell("not finite", "", "Some control's figure is not finite.")
    ends = span(*(shown(doc, key, end) for end in (min(means), max(means))))
    hover = (
        f"{doc['metrics'][key]['definition']} Mean of {len(means)} controls, and the range of their means."
    )
    return TableCell(shown(doc, key, sum(means) / len(means)), ends, hover)


def _gain(doc: Mapping[str, Any], edit: str, key: str) -> TableCell:
    for c in doc["comparisons"]:
        if (c["edit"], c["key"], c["against"]) == (edit, key, "controls"):
            break
    else:
        return TableCell("", "", "")
    if c["outcome"] not in _OUTCOMES:
        return TableCell("–", c["outcome"], f"No verdict: {c['outcome']}.", "none")
    tone, mark = _OUTCOMES[c["outcome"]]
    sign = 1 if doc["metrics"][key]["better"] == "higher" else -1
    ends = [None if c[end] is None else sign * c[end] for end in ("mean", "low", "high")]
    mean, low, high = (_points(doc, key, v) for v in ends)
    ends_text = span(low, high) if sign > 0 else span(high, low)
    hover = (
        f"{edit} against the mean of the controls on the same items, positive is better: {mean}, 95 % interval "
        f"{ends_text}, n = {c['n']}. A verdict only where it lies outside all controls by more than they differ: "
        f"{c['outcome']}."
    )
    return TableCell(f"{mark} {mean}", ends_text, hover, tone)


def _points(doc: Mapping[str, Any], key: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if doc["metrics"][key]["unit"] == "share":
        return f"{_signed(100 * value, 1)} pts"
    return _signed(value, 3)


def _signed(value: float, decimals: int) -> str:
    """With its sign, and zero without one."""
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}".replace("-", "−") if rounded else "0"


def fact_rows(doc: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    """Each fact of a group in every state."""
    rows = []
    for fact in doc["facts"]:
        if fact["group"] != group:
            continue
        cells = []
        for state in doc["states"]:
            one = fact["states"][state["name"]]
            notes = ["says it" if one["said"] else "does not say it"] if one.get("said") is not None else []
            if one.get("paraphrases", {}).get("of"):
                notes.append(f"{one['paraphrases']['right']}/{one['paraphrases']['of']} other wordings")
            if one.get("relearned_prob") is not None:
                notes.append(f"relearned {percent(one['relearned_prob'])}")
            if "lens_best_rank" in one:
                notes.append(f"best lens rank {one['lens_best_rank'] + 1}")
            cells.append(
                {
                    "prob": percent(one["prob"]),
                    "correct": one["correct"],
                    "notes": " · ".join(notes),
                    "written": one.get("written", ""),
                    "css": "edit" if state["role"] == "edit" else "",
                }
            )
        rows.append({"prompt": fact["prompt"], "target": fact["target"], "id": fact["id"], "cells": cells})
    return rows
