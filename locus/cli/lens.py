"""`locus lens`: at which layer the target becomes readable, and which parts of the model say it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from locus.cli.options import Loading, Running, Talking

SiteName = Literal["resid_post", "resid_mid", "attn_out", "mlp_out"]
LENS = "lens.safetensors"

if TYPE_CHECKING:
    from collections.abc import Sequence

    from locus.fact import Fact
    from locus.lens import LensGrid
    from locus.model import Model
    from locus.parallel.ranks import Ranks
    from tracing.localizers.direct_logit import DirectAttribution
    from tracing.tuned_lens import TunedLens


def lens(
    model: str,
    facts: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    sites: Annotated[tuple[SiteName, ...], Parameter(consume_multiple=True)] = ("resid_post",),
    top: int = 5,
    tuned: Path | None = None,
    text: Path | None = None,
    steps: int = 250,
    attribution: Annotated[bool, Parameter(negative="")] = False,
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Logit lens: read every layer's states through the model's own unembedding; tuned lens: through a trained one.

    Args:
        model: Checkpoint folder, hub id, or smollm2.
        facts: A fact file, or demo-forget.
        out: Folder for lens.safetensors, lens.json, a picture per fact.
        sites: What is read: the residual stream after each block, before its MLP, or what attention or the
            MLP alone write.
        top: Likeliest tokens kept in each cell.
        tuned: Read through the tuned lens of this file; where there is none, one is trained and written there. A
            stopped training goes on with --resume.
        text: What a tuned lens is trained on, paragraphs; the default is everyday text that comes with locus.
        steps: Of that training.
        attribution: Also write what each layer, head and neuron adds to the target's logit (direct logit
            attribution): attribution.safetensors, attribution.json, a picture per fact.
    """
    from locus.errors import InputError
    from locus.files.artefact import lock

    if (out / LENS).exists() and not running.resume:
        raise InputError(f"{out} holds a finished lens: give another folder, or --resume to write it anew")
    if tuned is not None and tuple(sites) != ("resid_post",):
        raise InputError(
            "--tuned: a tuned lens reads the residual stream after blocks: leave --sites at block_out"
        )
    loaded = loading.load(model)
    chosen = running.facts(facts)
    with lock(out), talking.progress():
        read_with = None
        if tuned is not None:
            read_with = tuned_lens_at(tuned, loaded, text, steps, running, talking)
        grids = lens_into(out, loaded, chosen, sites, top, tuned=read_with)
        shares = attribution_into(out, loaded, chosen) if attribution else {}
    rows = [_row(grid) for grid in grids]
    result = {"folder": str(out), "model": loaded.name, "facts": rows}
    talking.finish({**result, "attribution": shares} if attribution else result, _summary(grids, out))


def tuned_lens_at(
    path: Path, model: Model, text: Path | None, steps: int, running: Running, talking: Talking
) -> TunedLens:
    """The tuned lens in a file, refused if it is another model's; trained and written if there is no such file."""
    from locus.fact import neutral_text
    from tracing.tuned_lens import TunedLens, TunedLensTraining

    if path.exists():
        found = TunedLens.load(path)
        found.check(model)
        return found
    training = TunedLensTraining(steps=steps, seed=running.seed)
    talking.note(f"tuned lens: {training.cost(model)}; and unembeddings of all layers")
    state = path.parent / f"{path.stem}-training"
    lens = training.run(model, neutral_text(text), folder=state, resume=running.resume)
    lens.save(path)
    training.forget(state)
    return lens


def lens_into(
    folder: Path,
    model: Model,
    facts: Sequence[Fact],
    sites: Sequence[SiteName] = ("resid_post",),
    top: int = 5,
    ranks: Ranks | None = None,
    tuned: TunedLens | None = None,
) -> list[LensGrid]:
    """Read the facts through the lens and write lens.safetensors, lens.json and a picture per fact and site.

    Several processes share the facts, and the pictures.
    """
    from locus.files.artefact import save_json
    from locus.lens import LensGrid, lens_grid, save_grids
    from locus.parallel.map import each_value, together
    from locus.parallel.ranks import ALONE
    from locus.report import plot_lens
    from locus.tokens import encode

    name = "logit lens" if tuned is None else "tuned lens"
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "sites": list(sites),
        "top": top,
        "lens": name,
    }
    ranks = ranks or ALONE
    translate = None if tuned is None else tuned.translate
    wanted = [(fact, site) for fact in facts for site in sites]
    with together(ranks):
        grids = list(
            each_value(
                wanted,
                lambda one: lens_grid(
                    model, encode(model, one[0]), one[0].id, one[1], top, translate=translate
                ),
                LensGrid,
                name,
            )
        )
    for grid in ranks.share(grids, "pictures of the lens"):
        suffix = "lens" if len(sites) == 1 else f"lens-{grid.site}"
        plot_lens(grid, folder / f"{picture_name(grid.fact_id, suffix, facts)}.png", name)
    if not ranks.first:
        return grids
    save_grids(grids, folder / LENS, about)
    save_json(folder / "lens.json", "lens-info", {**about, "facts": [_row(grid) for grid in grids]})
    return grids


def picture_name(fact_id: str, suffix: str, facts: Sequence[Fact]) -> str:
    """File name of a fact's picture that is no other fact's: "x-lens" is both the lens of x and the fact x-lens."""
    taken = {fact.id.casefold() for fact in facts}
    name = f"{fact_id}-{suffix}"
    while name.casefold() in taken:
        name += "-picture"
    return name


def attribution_into(folder: Path, model: Model, facts: Sequence[Fact]) -> dict[str, Any]:
    """Direct logit attribution of each fact: tensors, the largest shares as JSON, a picture."""
    from locus.files.artefact import save_json, save_tensors
    from locus.progress import track
    from locus.report import plot_attribution
    from locus.tokens import encode
    from tracing.localizers.direct_logit import direct_attribution

    tensors, found = {}, {}
    for fact in track(facts, "direct logit attribution"):
        shares = direct_attribution(model, encode(model, fact))
        for name in ("attn", "mlp", "head", "neuron"):
            tensors[f"{fact.id}/{name}"] = getattr(shares, name).contiguous()
        found[fact.id] = _largest(shares)
        title = f"{fact.prompt} →{fact.target}: logit {shares.logit:.2f} above the mean"
        picture = picture_name(fact.id, "attribution", facts)
        plot_attribution(shares.attn, shares.mlp, shares.head, title, folder / f"{picture}.png")
    about = {"model": model.name, "fingerprint": model.fingerprint}
    save_tensors(folder / "attribution.safetensors", "direct-attribution", tensors, about)
    save_json(folder / "attribution.json", "direct-attribution-info", {**about, "facts": found})
    return found


def _largest(shares: DirectAttribution, n: int = 10) -> dict[str, Any]:
    """The sums, and the heads and neurons that add most."""
    most = {}
    for kind, grid in (("heads", shares.head), ("neurons", shares.neuron)):
        best = grid.flatten().topk(min(n, grid.numel()))
        width = grid.shape[1]
        most[kind] = [
            {"layer": int(i) // width, "index": int(i) % width, "logits": float(v)}
            for v, i in zip(best.values, best.indices, strict=True)
        ]
    return {
        "logit": shares.logit,
        "embed": shares.embed,
        "constant": shares.constant,
        "attn": shares.attn.tolist(),
        "mlp": shares.mlp.tolist(),
        **most,
    }


def _row(grid: LensGrid) -> dict[str, Any]:
    """A fact's answer through the lens at its last position."""
    return {
        "id": grid.fact_id,
        "site": grid.site,
        "target": grid.target,
        "readable_from": grid.readable_from,
        "prob": [float(p) for p in grid.prob[:, -1]],
        "rank": [int(r) for r in grid.rank[:, -1]],
        "kl": [float(k) for k in grid.kl[:, -1]],
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
