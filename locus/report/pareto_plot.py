"""Forgetting against utility: what a sweep found, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locus.files.artefact import atomic_file

_COLOURS = ("#1d4ed8", "#c2410c", "#047857", "#7c3aed", "#b45309", "#0e7490")


@dataclass(frozen=True)
class SweepPoint:
    """One edit of a sweep."""

    budget: str
    """Size of its mask, as it was asked for."""
    control: int | None
    """Number of the random mask; None for the located one."""
    strength: float
    """How many times the trained change."""
    forget_prob: float
    """Mean probability of the forget targets, over prompts and paraphrases."""
    forget_correct: float
    """Share of those that are still first choice."""
    utility: float
    """Share of the held-out facts the base had right that are still right."""
    kl: float
    """KL(base || edited) on unseen neutral text, nats a token."""

    @property
    def name(self) -> str:
        """The line it lies on."""
        return self.budget if self.control is None else f"{self.budget}, random {self.control}"


def pareto_points(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points that no other one beats in both forgetting and utility, most utility first.

    Of points that are equal in both, the first counts.
    """
    best: list[SweepPoint] = []
    for point in sorted(points, key=lambda p: (-p.utility, p.forget_prob)):
        if not best or point.forget_prob < best[-1].forget_prob:
            best.append(point)
    return best


def plot_front(points: Sequence[SweepPoint], path: str | Path) -> Path:
    """Utility over the probability that is left: a line a mask, random masks dashed, the Pareto front ringed.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    budgets = list(dict.fromkeys(point.budget for point in points))
    for name in dict.fromkeys(point.name for point in points):
        line = sorted((p for p in points if p.name == name), key=lambda p: p.strength)
        axis.plot(
            [p.forget_prob for p in line],
            [p.utility for p in line],
            color=_COLOURS[budgets.index(line[0].budget) % len(_COLOURS)],
            linestyle="-" if line[0].control is None else ":",
            marker="o" if line[0].control is None else ".",
            markersize=4,
            linewidth=1.2,
            label=name,
        )
    front = pareto_points([p for p in points if p.control is None])
    axis.scatter(
        [p.forget_prob for p in front],
        [p.utility for p in front],
        s=70,
        facecolors="none",
        edgecolors="black",
        linewidths=0.9,
        label="front of the located masks",
    )
    axis.set_xscale("symlog", linthresh=1e-3)
    axis.set_xlim(left=0)
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("mean p(target) left, prompts and paraphrases")
    axis.set_ylabel("held-out facts still right")
    axis.set_title("forgetting against utility", fontsize=10, loc="left")
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.legend(fontsize=7, frameon=False)
    with atomic_file(Path(path)) as part:
        figure.savefig(part, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)


def front_table(points: Sequence[SweepPoint]) -> Any:
    """The points as a rich table; those on the front of the located masks are marked."""
    from rich.table import Table

    front = pareto_points([p for p in points if p.control is None])
    table = Table("mask", "strength", "p left", "first choice", "held-out", "KL", "front")
    for p in points:
        mark = "*" if p in front else ""
        table.add_row(
            p.name,
            f"{p.strength:g}",
            f"{p.forget_prob:.4f}",
            f"{p.forget_correct:.0%}",
            f"{p.utility:.0%}",
            f"{p.kl:.4f}",
            mark,
        )
    return table
