"""The strength curve of an edit: what each strength does to what must go, and to what must stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locus.files.artefact import atomic_file

_FORGET, _RETAIN, _KL = "#b91c1c", "#1d4ed8", "#6b7280"


def plot_strength(points: Sequence[Mapping[str, Any]], strength: float, path: str | Path) -> Path:
    """Draw a strength curve: probability and accuracy on the left axis, KL on neutral text on the right one.

    Args:
        points: By strength: `strength`, `forget_prob`, and `retain_right` and `kl`, which may be None.
        strength: The one that was taken, marked by a line.
        path: Where; the ending says in which format.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    _line(axis, points, "forget_prob", _FORGET, "forget facts: p(target)", "o")
    _line(axis, points, "retain_right", _RETAIN, "retain facts still right", "s")
    axis.axvline(strength, color="black", linewidth=0.9, linestyle=":", label=f"taken: {strength:.3g}")
    axis.set_ylim(-0.02, 1.04)
    axis.set_xlabel("strength")
    axis.set_ylabel("probability, share")
    if any(point["kl"] is not None for point in points):
        right = axis.twinx()
        _line(right, points, "kl", _KL, "KL on neutral text", "^", linestyle="--")
        right.set_ylabel("KL, nats per token", color=_KL)
        right.set_ylim(bottom=0.0)
        lines, labels = right.get_legend_handles_labels()
    else:
        lines, labels = [], []
    own, names = axis.get_legend_handles_labels()
    figure.legend(
        [*own, *lines], [*names, *labels], loc="outside upper center", ncols=2, fontsize=8, frameon=False
    )
    with atomic_file(Path(path)) as part:
        figure.savefig(part, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)


def _line(
    axis: Any,
    points: Sequence[Mapping[str, Any]],
    name: str,
    colour: str,
    label: str,
    marker: str,
    linestyle: str = "-",
) -> None:
    there = [(point["strength"], point[name]) for point in points if point[name] is not None]
    if there:
        axis.plot(
            *zip(*there, strict=True),
            color=colour,
            marker=marker,
            markersize=3.5,
            linewidth=1.3,
            linestyle=linestyle,
            label=label,
        )
