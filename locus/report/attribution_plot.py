"""Direct logit attribution as a picture: who adds to the target's logit, layer by layer and head by head."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from locus.files.artefact import atomic_file
from locus.report.token_text import plain


def plot_attribution(
    attn: Float[Tensor, " layer"],
    mlp: Float[Tensor, " layer"],
    head: Float[Tensor, "layer head"],
    title: str,
    path: str | Path,
) -> Path:
    """Draw the shares of attention and MLP by layer, and those of the heads; returns the path."""
    from matplotlib.figure import Figure

    n_layers, n_heads = head.shape
    figure = Figure(figsize=(9.5, 1.4 + 0.16 * n_layers), dpi=150, layout="constrained")
    bars, grid = figure.subplots(1, 2, width_ratios=[1.2, 1], sharey=True)
    layers = [float(i) for i in range(n_layers)]
    bars.barh([y - 0.2 for y in layers], attn.numpy(), height=0.38, color="#c02b35", label="attention")
    bars.barh([y + 0.2 for y in layers], mlp.numpy(), height=0.38, color="#15803d", label="MLP")
    bars.axvline(0.0, color="#5a6270", linewidth=0.8)
    bars.set_xlabel("logits added to the target", fontsize=8)
    bars.set_ylabel("layer")
    bars.legend(fontsize=8, frameon=False)
    most = max(float(head.abs().max()), 1e-9)
    drawn = grid.pcolormesh(
        [i - 0.5 for i in range(n_heads + 1)],
        [i - 0.5 for i in range(n_layers + 1)],
        head.numpy(),
        cmap="PuOr_r",
        vmin=-most,
        vmax=most,
    )
    grid.set_xlabel("head", fontsize=8)
    grid.set_xticks(range(n_heads))
    for axis in (bars, grid):
        axis.tick_params(labelsize=7)
    bar = figure.colorbar(drawn, ax=grid, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(plain(title), fontsize=9)
    with atomic_file(Path(path)) as part:
        figure.savefig(part, format=Path(path).suffix.lstrip(".") or "png")
    return Path(path)
