"""A page about several localizers: where each one looks, how far they agree, how far each agrees with itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locus.report.chart import HeatMap
from locus.report.page import count, number, write_page

OVER_NAMES = {"paraphrases": "other words", "facts": "half of the facts", "seeds": "another seed"}


@dataclass(frozen=True)
class LocatedRow:
    """What the page says of one localizer."""

    name: str
    about: str
    """What it does, in a line."""
    neurons_per_layer: Sequence[int]
    n_weights: int
    cost: str
    seconds: float
    stability: Mapping[str, Mapping[str, float | None]]
    """Over what -> mean, low, high, chance."""
    skipped: str
    """Why there is none."""


def locate_report(
    path: str | Path,
    rows: Sequence[LocatedRow],
    overlaps: Sequence[Sequence[float]],
    about: Mapping[str, Any],
) -> Path:
    """Write the page; returns its path.

    Args:
        path: The .html file.
        rows: One a localizer.
        overlaps: Agreement of every two masks, 0 to 1, in the order of the rows.
        about: Model, fingerprint, facts, budget, chance of the overlap matrix.
    """
    names = [row.name for row in rows]
    table = [
        {"name": name, "cells": [(_short(value), value, i == j) for j, value in enumerate(line)]}
        for i, (name, line) in enumerate(zip(names, overlaps, strict=True))
    ]
    profile = HeatMap(
        "Share of each mask that lies in each layer",
        "h-block",
        names,
        [False] * len(names),
        [_shares(row.neurons_per_layer) for row in rows],
        "none",
        "the largest share of all",
        "share",
    )
    kinds = [over for over in OVER_NAMES if any(over in row.stability for row in rows)]
    return write_page(
        path,
        "locate.html.j2",
        rows=rows,
        names=names,
        table=table,
        profile=profile,
        kinds=kinds,
        over_names=OVER_NAMES,
        about=about,
        headline=agreement_headline(rows, overlaps),
        count=count,
        number=number,
    )


def agreement_headline(rows: Sequence[LocatedRow], overlaps: Sequence[Sequence[float]]) -> str:
    """Which two localizers agree most, among masks of like size: a small mask lies inside a large one by chance."""
    pairs = [
        (overlaps[i][j], rows[i].name, rows[j].name)
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if _alike(rows[i].n_weights, rows[j].n_weights)
    ]
    if not pairs:
        said = (f"{row.name}: {count(row.n_weights)} weights" for row in rows)
        return "; ".join(said) + "." if rows else "Nothing was located."
    best = max(pairs)
    middle = sorted(value for value, *_ in pairs)[len(pairs) // 2]
    most = f"{best[1]} and {best[2]} share {best[0]:.0%} of their weights"
    return f"{most}." if len(pairs) == 1 else f"{most}; two of these masks share {middle:.0%} at the median."


def _alike(n: int, m: int) -> bool:
    """Whether two sizes are within a factor of two."""
    return max(n, m) <= 2 * min(n, m)


def _short(value: float) -> str:
    return "1" if value >= 0.995 else f"{value:.2f}".removeprefix("0")


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [n / total if total else 0.0 for n in counts]
