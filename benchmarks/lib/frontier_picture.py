"""The arms of `frontier` in one picture: what each keeps, and what comes back, against what it costs on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#1d4ed8", "#b91c1c", "#15803d", "#a16207", "#7e22ce", "#0e7490", "#111827", "#be185d", "#78716c")
MARKS = ("o", "s", "^", "X", "D", "P", "v", "*")
FLOOR = 1e-4
"""Smallest KL that is drawn apart."""


@dataclass(frozen=True)
class Dot:
    """One arm, or the mean of several seeds."""

    objective: str
    place: str
    missed: bool
    """It forgot less than the others; drawn hollow."""
    figures: Mapping[str, float]


def draw(
    dots: Sequence[Dot],
    kl: str,
    panels: Mapping[str, str],
    beside: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """A panel a figure.

    Args:
        dots: What is drawn.
        kl: Figure of the horizontal axis, in nats a token.
        panels: Figures of the vertical axes, and what is written there.
        beside: Models that are not edited, by name: a dotted line each.
        path: Where the picture goes.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = dict(zip(dict.fromkeys(dot.objective for dot in dots), COLOURS, strict=False))
    marks = dict(zip(dict.fromkeys(dot.place for dot in dots), MARKS, strict=False))
    figure = Figure(figsize=(4.0 * len(panels), 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        for dot in dots:
            axis.plot(
                max(dot.figures[kl], FLOOR), dot.figures[key], marks[dot.place], markersize=7, alpha=0.85,
                color=colours[dot.objective], fillstyle="none" if dot.missed else "full",
            )  # fmt: skip
        for name, figures in ((name, figures) for name, figures in beside.items() if key in figures):
            axis.axhline(figures[key], color="black", linewidth=0.8, linestyle=":")
            axis.annotate(
                name, (1, figures[key]), (-2, 2), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=7, ha="right",
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("KL on neutral text, nats a token")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    shown = [Line2D([], [], linestyle="", marker="o", color=c, label=name) for name, c in colours.items()]
    shown += [
        Line2D([], [], linestyle="", marker=m, color="#475569", label=name) for name, m in marks.items()
    ]
    if any(dot.missed for dot in dots):
        shown.append(
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                fillstyle="none",
                color="#475569",
                label="hollow: forgot less",
            )
        )
    figure.legend(handles=shown, loc="outside upper center", ncols=8, fontsize=8, frameon=False)
    figure.savefig(path)
