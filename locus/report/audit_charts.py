"""The charts and heat maps of an audit document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from locus.audit.compare import EditsCompared
from locus.audit.metric_table import FIGURES
from locus.report.chart import Chart, HeatMap, Series
from locus.report.page import percent

MAX_FACTS = 40
"""Facts that a heat map shows, the first ones."""
_LABEL = 18  # letters of a heat map's row label


def charts(doc: Mapping[str, Any], css: Mapping[str, str]) -> list[Chart]:
    """Strength, lens, probe, patching and relearning curves, of every state that has them."""
    found = [
        _strength_chart(doc, css),
        _relearn_chart(doc, css),
        _relearn_chart(doc, css, "relearn.lora"),
        _lens_chart(doc, css),
        _layer_chart(doc, css, "probe"),
        _layer_chart(doc, css, "depth"),
    ]
    return [chart for chart in found if chart is not None]


def heat_maps(doc: Mapping[str, Any], css: Mapping[str, str]) -> list[HeatMap]:
    """Where each forgotten answer stands in every layer: the base beside each edit (and a model that never knew)."""
    maps = []
    for state in doc["states"]:
        facts = [f for f in doc["facts"] if f["group"] == "forget"][:MAX_FACTS]
        if state["role"] == "control" or not all("lens_rank" in f["states"][state["name"]] for f in facts):
            continue
        ranks = [f["states"][state["name"]]["lens_rank"] for f in facts]
        maps.append(
            HeatMap(
                title=f"{state['name']}: before" if state["role"] == "base" else state["name"],
                css=css[state["name"]],
                labels=[_short(f["target"].strip()) for f in facts],
                marked=[False] * len(facts),
                values=[[max(0.0, 1 - math.log10(rank + 1) / 3) for rank in row] for row in ranks],
                low="rank 1000 or worse",
                high="first",
                quantity="",
                strongest=1.0,
                hover=[
                    [f"{f['prompt']}{f['target']} · layer {i}: rank {rank + 1}" for i, rank in enumerate(row)]
                    for f, row in zip(facts, ranks, strict=True)
                ],
            )
        )
    return maps if len(maps) > 1 else []


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


def _strength_chart(doc: Mapping[str, Any], css: Mapping[str, str]) -> Chart | None:
    series = []
    for state in doc["states"]:
        for kind, what in (("forget", "p(target)"), ("held_out", "held-out right")):
            curves = state["curves"]
            # "dose": written by the release before
            if (curve := curves.get(f"strength.{kind}") or curves.get(f"dose.{kind}")) is None:
                continue
            values = [(None, None, None, 0) if v is None else (v["mean"], v["low"], v["high"], v["n"])
                      for v in curve["values"]]  # fmt: skip
            hover = [
                f"{state['name']} at {x:g} of its strength: {what} {percent(mean)}, n = {n}"
                for x, (mean, _, _, n) in zip(curve["xs"], values, strict=True)
            ]
            ys = [mean for mean, *_ in values]
            name = f"{state['name']}: {what}"
            series.append(
                Series(name, curve["xs"], ys, css[state["name"]], dashed=kind == "held_out", hover=hover)
            )
    if not series:
        return None
    caption = (
        "The same change of weights at part of its strength: 0 is the base, 1 the edit. Full lines should fall, "
        "dashed ones should stay up; where the full line is down already, more strength only costs."
    )
    return Chart(
        "Strength: how much of the edit is needed",
        caption,
        "strength",
        "share",
        series,
        y_max=1.0,
        integer_x=False,
    )


_LAYERED = {
    "probe": (
        "Linear probes, layer by layer",
        "Share of the forgotten answers that a linear map, trained on retained facts only, decodes from the hidden "
        "state after each layer.",
        True,
    ),
    "depth": (
        "Patched into the base, layer by layer",
        "log-probability of the target (nats a token) that the base loses when one layer's hidden states come from "
        "the edited model. Near zero: that layer still carries the answer.",
        False,
    ),
}


def _layer_chart(doc: Mapping[str, Any], css: Mapping[str, str], name: str) -> Chart | None:
    title, caption, share = _LAYERED[name]
    series = []
    for state in doc["states"]:
        if (curve := state["curves"].get(name)) is None or (name == "depth" and state["role"] == "base"):
            continue
        ys = [None if v is None else v["mean"] for v in curve["values"]]
        label = state["name"]
        series.append(Series(label, curve["xs"], ys, css[label], dashed=state["role"] == "control"))
    if not series:
        return None
    return Chart(title, caption, "layer", "", series, percent=share, y_max=1.0 if share else None)


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


def _relearn_chart(doc: Mapping[str, Any], css: Mapping[str, str], name: str = "relearn") -> Chart | None:
    series, n, n_taught = [], 0, 0
    for state in doc["states"]:
        if (curve := state["curves"].get(name)) is None:
            continue
        steps, tested = (
            (curve["steps"], curve["tested"]) if name == "relearn" else (curve["xs"], curve["values"])
        )
        n = tested[0]["n"]
        n_taught = curve.get("n_taught", doc["data"]["forget"] - n)
        ys = [one["mean"] for one in tested]
        main = state["role"] == "edit"
        series.append(
            Series(
                state["name"],
                steps,
                ys,
                css[state["name"]],
                low=[one["low"] for one in tested] if main else (),
                high=[one["high"] for one in tested] if main else (),
                dashed=not main,
                hover=[
                    f"{state['name']}, after {step:g} steps: p(target) {percent(one['mean'])} "
                    f"({percent(one['low'])} to {percent(one['high'])}), n = {n}"
                    for step, one in zip(steps, tested, strict=True)
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
    how = "fine-tuned" if name == "relearn" else "given low-rank adapters that are trained"
    caption = (
        f"p(target) of {n} forgotten facts while the model is {how} on the other {n_taught}. A line that climbs "
        "back towards the base shows that the knowledge was only covered up. Band: its 95 % interval over facts."
    )
    highest = max((y for s in series for y in (*s.ys, *s.high) if y is not None), default=0.0)
    y_max = 1.0 if highest > 0.4 else None
    return Chart(
        f"Relearning{'' if name == 'relearn' else ' by LoRA'}: the half that was not taught",
        caption,
        "training steps",
        "p(target)",
        series,
        y_max=y_max,
    )


def front_chart(side: EditsCompared, css: Mapping[str, str]) -> Chart | None:
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
