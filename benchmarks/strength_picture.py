"""The strength curves of `direct_edits` in one picture: what is forgotten against what is lost.

python -m benchmarks.strength_picture FOLDER -o strength.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = ("#1d4ed8", "#b91c1c", "#15803d", "#a16207", "#7e22ce", "#0e7490", "#475569", "#be185d")


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Points with everything measured of every row that has a strength curve, by the row's name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        points = json.loads(path.read_text("utf-8")).get("outcome", {}).get("strength_curve", [])
        if whole := [point for point in points if point["kl"] is not None]:
            found[_name(path.stem)] = whole
    return found


def _name(stem: str) -> str:
    """A row's name from its file's: descent-10 is "descent, 10 % of the neurons"."""
    *words, last = stem.split("-")
    share = f"{last} % of the neurons" if last.replace(".", "").isdigit() else f"whole {last}"
    return f"{' '.join(words)}, {share}"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Retain facts still right, and KL on neutral text, against the forget facts' mean probability."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, points), colour in zip(found.items(), COLOURS, strict=False):
        x = [point["forget_prob"] for point in points]
        style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.3, "label": name}
        left.plot(x, [point["retain_right"] for point in points], **style)
        right.plot(x, [max(point["kl"], 1e-5) for point in points], **style)
    for axis in (left, right):
        axis.axvline(0.05, color="black", linewidth=0.8, linestyle=":")
        axis.invert_xaxis()
        axis.set_xlabel("mean p(target) of the forget facts")
    left.set_ylabel("retain facts still right")
    left.set_ylim(-0.03, 1.03)
    right.set_ylabel("KL on neutral text, nats a token")
    right.set_yscale("log")
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Draw the finished rows of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    draw(curves(args.folder), args.out)


if __name__ == "__main__":
    main()
