"""The logit lens as the picture people know: a table of tokens, layer by layer."""

from __future__ import annotations

from pathlib import Path

from locus.files.artefact import atomic_file
from locus.lens import LensGrid
from locus.report.token_text import plain, seen

_MOST_POSITIONS = 24
_LONGEST = 11


def plot_lens(grid: LensGrid, path: str | Path, lens: str = "logit lens") -> Path:
    """Draw one prompt's table: positions on x, layers on y from the bottom, the likeliest token in each cell.

    The colour is the probability of the target's first token; cells where it is on top are framed. Of a long
    prompt the last positions are shown.

    Args:
        grid: What was read.
        path: A .png, .pdf or .svg.
        lens: What it was read with.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n_layers, n_pos = grid.prob.shape
    first = max(0, n_pos - _MOST_POSITIONS)
    shown = range(first, n_pos)
    figure = Figure(figsize=(1.6 + 0.72 * len(shown), 1.3 + 0.21 * n_layers), dpi=150, layout="constrained")
    axis = figure.subplots()
    drawn = axis.pcolormesh(grid.prob[:, first:].float().numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    for layer in range(n_layers):
        for column, position in enumerate(shown):
            prob = float(grid.prob[layer, position])
            word = plain(seen(grid.top_tokens[layer][position], _LONGEST))
            colour = "white" if prob > 0.6 else "black"
            axis.text(column + 0.5, layer + 0.5, word, ha="center", va="center", fontsize=6.5, color=colour)
            if int(grid.rank[layer, position]) == 0:
                axis.add_patch(
                    Rectangle((column, layer), 1, 1, fill=False, edgecolor="#c2410c", linewidth=1.1)
                )
    labels = [plain(seen(grid.tokens[position], _LONGEST)) for position in shown]
    axis.set_xticks([0.5 + i for i in range(len(labels))], labels, fontsize=8, rotation=35, ha="right")
    ticks = range(0, n_layers, max(1, round(n_layers / 15)))
    axis.set_yticks([0.5 + i for i in ticks], [str(i) for i in ticks], fontsize=8)
    axis.set_ylabel("layer")
    place = {
        "resid_post": "after each block",
        "resid_mid": "before each MLP",
        "attn_out": "attention's share",
        "mlp_out": "the MLP's share",
    }[grid.site]
    axis.set_title(
        plain(f"{lens}, {place}: likeliest token (framed where it is {grid.target!r})"),
        fontsize=9,
        loc="left",
    )
    bar = figure.colorbar(drawn, ax=axis, pad=0.01, fraction=0.03)
    bar.set_label(plain(f"p({grid.target!r})"), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    with atomic_file(Path(path)) as part:
        figure.savefig(part, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)
