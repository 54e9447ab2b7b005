"""`locus lens`: at which layer the target becomes readable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from locus.cli.options import Loading, Running, Talking

Site = Literal["block_out", "block_mid", "attn_out", "mlp_out"]
LENS = "lens.safetensors"

if TYPE_CHECKING:
    from collections.abc import Sequence

    from locus.fact import Fact
    from locus.lens import LensGrid
    from locus.model import Model
    from locus.ranks import Ranks


def lens(
    model: str,
    facts: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    sites: Annotated[tuple[Site, ...], Parameter(consume_multiple=True)] = ("block_out",),
    top: int = 5,
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Logit lens: read every layer's states through the model's own unembedding.

    Args:
        model: Checkpoint folder, hub id, or smollm2.
        facts: A fact file, or demo-forget.
        out: Folder for lens.safetensors, lens.json, a picture a fact.
        sites: What is read: the residual stream after each block, before its MLP, or what attention or the
            MLP alone write.
        top: Likeliest tokens kept in each cell.
    """
    from locus.artefact import lock
    from locus.errors import InputError

    if (out / LENS).exists() and not running.resume:
        raise InputError(f"{out} holds a finished lens: give another folder, or --resume to write it anew")
    loaded = loading.load(model)
    chosen = running.facts(facts)
    with lock(out), talking.progress():
        grids = lens_into(out, loaded, chosen, sites, top)
    rows = [_row(grid) for grid in grids]
    talking.finish({"folder": str(out), "model": loaded.name, "facts": rows}, _summary(grids, out))


def lens_into(
    folder: Path,
    model: Model,
    facts: Sequence[Fact],
    sites: Sequence[Site] = ("block_out",),
    top: int = 5,
    ranks: Ranks | None = None,
) -> list[LensGrid]:
    """Read the facts through the lens and write lens.safetensors, lens.json and a picture a fact and site.

    Of several processes each reads all the facts, which is a forward pass each, and draws its share of them.
    """
    from locus.artefact import save_json
    from locus.lens import lens_grid, save_grids
    from locus.progress import track
    from locus.ranks import ALONE
    from locus.report import plot_lens
    from locus.tokens import encode

    about = {"model": model.name, "fingerprint": model.fingerprint, "sites": list(sites), "top": top}
    ranks = ranks or ALONE
    grids: list[LensGrid] = []
    for fact in track(facts, "logit lens"):
        encoded = encode(model, fact)
        grids += [lens_grid(model, encoded, fact.id, site, top) for site in sites]
    for grid in ranks.share(grids, "pictures of the lens"):
        name = f"{grid.fact_id}-lens" if len(sites) == 1 else f"{grid.fact_id}-lens-{grid.site}"
        plot_lens(grid, folder / f"{name}.png")
    if not ranks.first:
        return grids
    save_grids(grids, folder / LENS, about)
    save_json(folder / "lens.json", "lens-info", {**about, "facts": [_row(grid) for grid in grids]})
    return grids


def _row(grid: LensGrid) -> dict[str, Any]:
    """A fact's answer through the lens at its last position."""
    return {
        "id": grid.fact_id,
        "site": grid.site,
        "target": grid.target,
        "readable_from": grid.readable_from,
        "prob": [float(p) for p in grid.prob[:, -1]],
        "rank": [int(r) for r in grid.rank[:, -1]],
    }


def _summary(grids: Sequence[LensGrid], folder: Path) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("fact")
    table.add_column("read at")
    table.add_column("target on top from layer", justify="right")
    table.add_column("p at the last layer", justify="right")
    for grid in grids:
        first = "never" if grid.readable_from is None else str(grid.readable_from)
        table.add_row(grid.fact_id, grid.site, first, f"{float(grid.prob[-1, -1]):.3f}")
    table.caption = f"tables of tokens: {folder}"
    return table
