"""An audit document turned into what its page shows: rows, cells, charts. No HTML here, no arithmetic there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locus.audit.compare import Side
from locus.audit.figure import FIGURES
from locus.report.chart import Chart, Series
from locus.report.page import number, percent, span

QUESTIONS = {
    "forgotten": "Forgotten?",
    "general": "In other words too?",
    "spared": "Other facts spared?",
    "intact": "Neutral text unharmed?",
    "hidden": "Gone from inside?",
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
_ALWAYS = (
    "forget.prob",
    "forget.top1",
    "paraphrase.top1",
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
class Cell:
    """One figure in the table."""

    value: str
    """Empty where it was not measured."""
    range: str
    """Its interval, and n."""
    hover: str
    css: str = ""


@dataclass(frozen=True)
class Row:
    """One figure in every state."""

    label: str
    definition: str
    cells: Sequence[Cell]
    gains: Sequence[Cell]
    """Against the controls, one for each edit; empty cells where there is none."""


@dataclass(frozen=True)
class Section:
    """Rows that answer one question."""

    title: str
    rows: Sequence[Row]


def state_css(doc: Mapping[str, Any]) -> dict[str, str]:
    """The colour class of each state."""
    css, n_edits = {}, 0
    for state in doc["states"]:
        if state["role"] == "edit":
            css[state["name"]] = f"s-edit{n_edits % 3}"
            n_edits += 1
        else:
            css[state["name"]] = {"base": "s-base", "control": "s-control"}.get(state["role"], "s-edit3")
    return css


def verdict_rows(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Question, answer, colour and sentence of each verdict."""
    return [
        {
            "question": QUESTIONS[v["question"]],
            "answer": v["answer"],
            "tone": _TONES[v["answer"]],
            "sentence": v["sentence"],
        }
        for v in verdicts
    ]


def table(doc: Mapping[str, Any], everything: bool = False) -> list[Section]:
    """The figures by section; the main ones, or all that were measured in some state."""
    edits = [s["name"] for s in doc["states"] if s["role"] == "edit"]
    sections: dict[str, list[Row]] = {}
    for key in _ordered(doc["metrics"]):
        metric = doc["metrics"][key]
        measured = any(state["figures"].get(key) is not None for state in doc["states"])
        if (not measured and (everything or key not in _ALWAYS)) or (key in _DETAILS and not everything):
            continue
        cells = [_cell(doc, state, key) for state in doc["states"]]
        gains = [_gain(doc, edit, key) for edit in edits]
        label = "perplexity on neutral text" if key == "text.nll" else metric["label"]
        row = Row(label, metric["definition"], cells, gains)
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


def _cell(doc: Mapping[str, Any], state: Mapping[str, Any], key: str) -> Cell:
    figure = state["figures"].get(key)
    css = "edit" if state["role"] == "edit" else ""
    if figure is None:
        if state["role"] in ("base", "reference") and key == "relearn.prob":
            return Cell("", "", "Nothing was removed from it that could come back.", css)
        return Cell("", "not measured", "Not measured: no evidence, which is not a pass.", css)
    if key == "text.kl" and state["role"] == "base":
        return Cell("0", "", "The base beside itself.", css)
    if figure["n"] is None:
        definition = doc["metrics"][key]["definition"]
        return Cell(shown(doc, key, figure["mean"]), "one number for the whole set", definition, css)
    ends = "" if "finite" in figure else span(*(shown(doc, key, figure[end]) for end in ("low", "high")))
    metric = doc["metrics"][key]
    facts = "paragraphs" if key.startswith("text.") else "facts"
    hover = f"{metric['definition']} 95 % interval {ends}; n = {figure['n']} {facts}"
    hover += f", {figure['n_items']} items." if figure["n_items"] != figure["n"] else "."
    return Cell(
        shown(doc, key, figure["mean"]), f"{ends} · n {figure['n']}", f"{state['name']}: {hover}", css
    )


def _gain(doc: Mapping[str, Any], edit: str, key: str) -> Cell:
    for c in doc["comparisons"]:
        if (c["edit"], c["key"], c["against"]) == (edit, key, "controls"):
            break
    else:
        return Cell("", "", "")
    if c["outcome"] not in _OUTCOMES:
        return Cell("–", c["outcome"], "Too few facts for a verdict.", "none")
    tone, mark = _OUTCOMES[c["outcome"]]
    sign = 1 if doc["metrics"][key]["better"] == "higher" else -1
    ends = [None if c[end] is None else sign * c[end] for end in ("mean", "low", "high")]
    mean, low, high = (_points(doc, key, v) for v in ends)
    ends_text = span(low, high) if sign > 0 else span(high, low)
    hover = (
        f"{edit} against the mean of the controls on the same items, positive is better: {mean}, 95 % interval "
        f"{ends_text}, n = {c['n']}. A verdict only where the interval excludes zero: {c['outcome']}."
    )
    return Cell(f"{mark} {mean}", ends_text, hover, tone)


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


def charts(doc: Mapping[str, Any]) -> list[Chart]:
    """Lens and relearning curves of every state that has them."""
    css = state_css(doc)
    found = []
    if chart := _lens_chart(doc, css):
        found.append(chart)
    if chart := _relearn_chart(doc, css):
        found.append(chart)
    return found


def _lens_chart(doc: Mapping[str, Any], css: Mapping[str, str]) -> Chart | None:
    series, n = [], 0
    for state in doc["states"]:
        if (curve := state["curves"].get("lens")) is None or not curve["k"]:
            continue
        k = max(curve["k"], key=int)
        ys, n = curve["k"][k]["top"], curve["n"]
        hover = [
            f"{state['name']}, layer {i}: {percent(y)} of {n} answers in the top {k}"
            for i, y in enumerate(ys)
        ]
        role = state["role"]
        series.append(
            Series(
                state["name"], range(len(ys)), ys, css[state["name"]], dashed=role == "control", hover=hover
            )
        )
    if not series:
        return None
    caption = (
        f"Share of the {n} forgotten answers whose first token is among the {k} likeliest when the model is stopped "
        "after each layer (logit lens at the last prompt position). What stays high in the edited model is hidden, "
        "not gone."
    )
    return Chart(f"Readable inside: top {k} by layer", caption, "layer", "share", series, y_max=1.0)


def _relearn_chart(doc: Mapping[str, Any], css: Mapping[str, str]) -> Chart | None:
    series, n, n_taught = [], 0, 0
    for state in doc["states"]:
        if (curve := state["curves"].get("relearn")) is None:
            continue
        tested, n, n_taught = curve["tested"], curve["n"], curve["n_taught"]
        ys = [one["mean"] for one in tested]
        main = state["role"] == "edit"
        series.append(
            Series(
                state["name"],
                curve["steps"],
                ys,
                css[state["name"]],
                low=[one["low"] for one in tested] if main else (),
                high=[one["high"] for one in tested] if main else (),
                dashed=not main,
                hover=[
                    f"{state['name']}, after {step} steps: p(target) {percent(one['mean'])} "
                    f"({percent(one['low'])} to {percent(one['high'])}), n = {n}"
                    for step, one in zip(curve["steps"], tested, strict=True)
                ],
            )
        )
    if not series:
        return None
    base = base_level(doc)
    if base is not None:
        steps = series[0].xs
        label = f"base, all {base['n']} facts"
        flat = [base["mean"]] * len(steps)
        series.insert(0, Series(label, steps, flat, "s-base", dashed=True))
    caption = (
        f"p(target) of {n} forgotten facts while the model is fine-tuned on the other {n_taught}. A line that climbs "
        "back towards the base shows that the knowledge was only covered up. Band: 95 %, bootstrap over facts."
    )
    highest = max((y for s in series for y in (*s.ys, *s.high) if y is not None), default=0.0)
    y_max = 1.0 if highest > 0.4 else None
    return Chart(
        "Relearning: the half that was not taught",
        caption,
        "training steps",
        "p(target)",
        series,
        y_max=y_max,
    )


def front_chart(side: Side, css: Mapping[str, str]) -> Chart | None:
    """Forgetting against what was kept, one dot an edit; None where either was not measured."""
    series = []
    for c in side.candidates:
        gone, kept = c.figures.get("forget.prob"), c.figures.get("held_out.top1")
        if not gone or not kept or gone["mean"] is None or kept["mean"] is None:
            continue
        hover = f"{c.name}: p(target) {percent(gone['mean'])}, held-out right {percent(kept['mean'])}"
        hover += ", on the Pareto front" if c.on_front else ", beaten by another edit"
        name = f"{c.name}{' (Pareto)' if c.on_front else ''}"
        series.append(Series(name, [100 * gone["mean"]], [kept["mean"]], css[c.name], hover=[hover]))
    if not series:
        return None
    right = max(1.0, 1.1 * max(float(s.xs[0]) for s in series))
    names = [FIGURES[key].label for key in side.objectives]
    caption = (
        "Upper left is best. Pareto: no other edit is at least as good on "
        f"{', '.join(names)} and better on one of them. Means; the intervals are in the table."
    )
    return Chart(
        title="Forgetting against keeping",
        caption=caption,
        x_label="p(target) left, %",
        y_label="held-out right",
        series=series,
        y_max=1.0,
        integer_x=False,
        x_range=(0.0, right),
    )


def base_level(doc: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The base's p(target) on the forget facts."""
    figure: Mapping[str, Any] | None = doc["states"][0]["figures"].get("forget.prob")
    return figure if figure is not None and figure["mean"] is not None else None


def fact_rows(doc: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    """Each fact of a group in every state."""
    rows = []
    for fact in doc["facts"]:
        if fact["group"] != group:
            continue
        cells = []
        for state in doc["states"]:
            one = fact["states"][state["name"]]
            notes = []
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
                    "css": "edit" if state["role"] == "edit" else "",
                }
            )
        rows.append({"prompt": fact["prompt"], "target": fact["target"], "id": fact["id"], "cells": cells})
    return rows
