"""Causal traces as heat maps and curves: a PNG for a paper, a page for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locus.files.artefact import atomic_file
from locus.report.chart import Chart, HeatMap, Series
from locus.report.page import count, number, percent, write_page
from locus.report.token_text import plain, seen
from locus.trace import TOKEN_CLASSES, FactTrace, Trace

KIND_NAMES = {
    "block": "block output",
    "mlp": "MLP output",
    "attn": "attention output",
    "block-no-mlp": "block output, later MLPs severed",
    "block-no-attn": "block output, later attention severed",
}
_HEAD_PARTS = {"head": "output", "query": "query", "key": "key", "value": "value"}
_METRICS = {
    "prob": "the answer's probability",
    "first_prob": "the probability of the answer's first token",
    "logprob": "the answer's log-probability in nats",
    "logit_diff": "the logit of the answer minus that of a wrong one",
    "kl": "minus the divergence from the clean prediction in nats",
    "rank": "minus the number of tokens ranked above the answer",
}
_CORRUPTIONS = {
    "gaussian": "corrupted with Gaussian noise",
    "uniform": "corrupted with uniform noise",
    "swap": "exchanged for that of another fact",
    "mean": "replaced by the mean subject",
    "prompt": "exchanged, with the rest of the prompt, for that of another fact",
}
_COLOURS = {"block": "Purples", "mlp": "Greens", "attn": "Reds"}
_MOST_CELLS = 60_000
_CLASS_NAMES = {
    "before_subject": "before the subject",
    "first_subject": "first subject token",
    "middle_subject": "middle subject tokens",
    "last_subject": "last subject token",
    "first_subsequent": "first token after",
    "further": "further tokens",
    "last_token": "last token",
}
_CLASS_CSS = {
    "first_subject": "s-edit3",
    "middle_subject": "s-edit2",
    "last_subject": "s-edit0",
    "first_subsequent": "s-control",
    "further": "s-base",
    "last_token": "s-edit1",
}


def kind_name(kind: str, window: int | None = None) -> str:
    """What a kind of state is called, with the layers that are restored together where there are several."""
    part, _, number = kind.partition(":")
    if number:
        return f"{_HEAD_PARTS.get(part, part)} of {'key/value ' if part in ('key', 'value') else ''}head {number}"
    together = (
        f", {window} layers around" if kind in ("mlp", "attn") and window is not None and window > 1 else ""
    )
    return KIND_NAMES.get(kind, kind) + together


def plot_trace(trace: FactTrace, path: str | Path, window: int | None = None) -> Path:
    """Draw one fact's grids side by side as the ROME paper does, into a PNG, PDF or SVG by its ending.

    Tokens on y (those of the subject end in *), layers on x, the metric with that state restored as colour,
    from the corrupted run's value up.

    Args:
        trace: The fact's.
        path: Where to; folders are made.
        window: Layers that were restored together for MLP and attention outputs, to be named in the titles.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    kinds = trace.kinds
    labels = _labels(trace)
    height = 1.5 + 0.21 * len(labels)
    figure = Figure(figsize=(1.2 + 4.1 * len(kinds), height), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        grid = trace.scores[kind].T.float().numpy()
        top = max(float(grid.max()), trace.corrupted_score + 1e-9)
        drawn = axis.pcolormesh(
            grid, cmap=_COLOURS.get(_family(kind), "Blues"), vmin=trace.corrupted_score, vmax=top
        )
        axis.invert_yaxis()
        axis.set_title(kind_name(kind, window), fontsize=10)
        axis.set_xlabel("layer")
        axis.set_yticks([0.5 + i for i in range(len(labels))], [plain(label) for label in labels], fontsize=8)
        step = max(1, math.ceil(grid.shape[1] / 7 / 5) * 5 if grid.shape[1] > 8 else 1)
        marks = range(0, grid.shape[1], step)
        axis.set_xticks([0.5 + i for i in marks], [str(i) for i in marks], fontsize=8)
        bar = figure.colorbar(drawn, ax=axis, shrink=0.8, aspect=28)
        bar.ax.tick_params(labelsize=7)
        bar.ax.set_title("p" if _is_probability(trace) else "score", fontsize=8)
    title = (
        f"p({plain(trace.target.strip())}) when one clean state is restored: clean {trace.clean_prob:.3f}, "
    )
    starred = " (*: the subject)" if trace.subject is not None else ""
    figure.suptitle(f"{title}corrupted {trace.corrupted_prob:.3f}{starred}", fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temp:
        figure.savefig(temp, format=path.suffix.lstrip(".") or "png")
    return path


def trace_report(trace: Trace, folder: str | Path) -> Path:
    """Write one self-contained report.html about a set of traces into a folder; returns its path.

    Facts are drawn until 60,000 cells are on the page; the page says how many are left to the artefact.
    """
    drawn: list[dict[str, Any]] = []
    cells, window = 0, trace.settings.get("window")
    for fact in trace.facts:
        cells += sum(grid.numel() for grid in fact.scores.values())
        if drawn and cells > _MOST_CELLS:
            break
        drawn.append({"fact": fact, "maps": [_heat_map(fact, kind, window) for kind in fact.kinds]})
    average, total = trace.average(), trace.average_total()
    shares = all(_is_probability(fact) for fact in trace.facts)
    return write_page(
        Path(folder) / "report.html",
        "trace.html.j2",
        trace=trace,
        total=total,
        headline=trace_headline(average, total),
        metric=_METRICS.get(trace.settings.get("metric", "prob"), "the metric"),
        corruption=_corruption(trace.settings),
        noising=trace.settings.get("direction") == "noise",
        charts=[_average_chart(kind, classes, shares, window) for kind, classes in average.items()],
        facts=drawn,
        left_out=len(trace.facts) - len(drawn),
        kind_name=kind_name,
        window=window if {"mlp", "attn"} & set(trace.kinds) else None,
        shown=percent if shares else number,
        percent=percent,
        count=count,
    )


def trace_headline(average: Mapping[str, Mapping[str, Mapping[str, Any]]], total: Mapping[str, float]) -> str:
    """Where, for each kind of inner site, restoring a clean state brings back most.

    Whole blocks are left out beside other kinds: restoring one late at the last token is the answer itself.
    """
    if total["total_effect"] <= 0:
        return "The corruption does not take the answer away: there is nothing to restore."
    parts = []
    for kind, classes in average.items():
        if (kind == "block" and len(average) > 1) or not classes:
            continue
        name, layer = max(
            ((name, layer) for name, curve in classes.items() for layer in range(len(curve["effect"]))),
            key=lambda site: classes[site[0]]["effect"][site[1]],
        )
        share = classes[name]["effect"][layer] / total["total_effect"]
        back = "all of it" if share >= 0.995 else percent(max(0.0, share))
        parts.append(f"{kind_name(kind)} at the {_CLASS_NAMES[name]} around layer {layer} ({back})")
    return f"What brings most of the answer back: {', '.join(parts)}."


def _corruption(settings: Mapping[str, Any]) -> str:
    """What was done to the subject, in words."""
    words = _CORRUPTIONS.get(settings.get("corruption", "gaussian"), "corrupted")
    sd, noise = settings.get("pooled_subject_sd"), settings.get("noise")
    if "noise" not in words or not sd or noise is None:
        return words
    size = "standard deviation" if "Gaussian" in words else "half-width"
    return f"{words} ({size} {noise:.3g}, {noise / sd:.3g} times the spread of the subjects' embeddings)"


def _family(kind: str) -> str:
    """The kind whose colour it has."""
    part = kind.partition("-")[0].partition(":")[0]
    return "attn" if part in _HEAD_PARTS else part


def _heat_map(fact: FactTrace, kind: str, window: int | None) -> HeatMap:
    effect = fact.indirect_effect(kind).T
    subject = range(*fact.subject) if fact.subject is not None else range(0)
    top = float(effect.max()) + fact.corrupted_score
    return HeatMap(
        title=kind_name(kind, window),
        css=f"h-{_family(kind)}" if _family(kind) in KIND_NAMES else "s-edit0",
        labels=_labels(fact),
        marked=[i in subject for i in range(len(fact.tokens))],
        values=effect.tolist(),
        low=_shown(fact, fact.corrupted_score),
        high=_shown(fact, top),
        quantity="effect",
    )


def _average_chart(
    kind: str, classes: Mapping[str, Mapping[str, Any]], shares: bool, window: int | None
) -> Chart:
    series = []
    for name in TOKEN_CLASSES:
        if name not in classes or name not in _CLASS_CSS:
            continue
        curve = classes[name]
        effect, band = curve["effect"], curve["band"]
        label = _CLASS_NAMES[name]
        hover = [
            f"{label}, layer {i}: {100 * e:.2f} ± {100 * b:.2f} points, n = {curve['n']}"
            if shares
            else f"{label}, layer {i}: {e:.4g} ± {b:.2g}, n = {curve['n']}"
            for i, (e, b) in enumerate(zip(effect, band, strict=True))
        ]
        low = [e - b for e, b in zip(effect, band, strict=True)]
        high = [e + b for e, b in zip(effect, band, strict=True)]
        series.append(
            Series(
                f"{label} (n {curve['n']})",
                range(len(effect)),
                effect,
                _CLASS_CSS[name],
                low,
                high,
                hover=hover,
            )
        )
    return Chart(kind_name(kind, window), "", "layer", "effect", series, percent=shares)


def _is_probability(fact: FactTrace) -> bool:
    """Whether the metric is the target's probability."""
    return fact.clean_score == fact.clean_prob and fact.corrupted_score == fact.corrupted_prob


def _shown(fact: FactTrace, score: float) -> str:
    return percent(score) if _is_probability(fact) else number(score)


def _labels(fact: FactTrace) -> list[str]:
    """Tokens as a reader can see them, those of the subject ending in *."""
    subject = range(*fact.subject) if fact.subject is not None else range(0)
    return [seen(token, 22) + ("*" if i in subject else "") for i, token in enumerate(fact.tokens)]
