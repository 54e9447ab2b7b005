"""What can be patched: a site of some layers, at some positions, with values from some run.

A `PatchedRun` is one patched forward, described: the base run goes on as it is but for the patches. Everything that
patches (causal tracing, severed variants, heads, neurons, noising) is a list of cells, and every engine
(`tracing.patching.plain_engine`, `tracing.replay.replay_engine`) answers a list of cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from locus.atlas import Atlas
from locus.atlas import Site as Site
from locus.errors import InputError

PatchSource = Literal["other", "base", "zero", "mean"]
"""Where a patch takes its values: the other run (the clean one when denoising, the corrupted one when noising),
the base run itself (pinning: what a severed path keeps), zero, or a mean given with the question."""

Kind = str
"""What a trace restores: one of `KINDS`, or a part of one head: "head:3" its output, "query:3", "key:1", "value:1"
(keys and values by their own heads' numbers, of which some models have fewer)."""

HEAD_PARTS: Mapping[str, Site] = MappingProxyType({"head": "z", "query": "q", "key": "k", "value": "v"})
"""Kinds of one head -> their site."""

KINDS = ("block", "mlp", "attn", "block-no-mlp", "block-no-attn")
"""Block outputs at one layer; MLP or attention outputs over a window of layers; block outputs with every later
MLP (or attention) output at that position pinned to the base run: the severed variants."""


@dataclass(frozen=True)
class Patch:
    """Set one site to other values."""

    site: Site
    layers: tuple[int, int]
    """First layer and the one after the last."""
    positions: tuple[int, ...]
    """Ascending, not empty."""
    source: PatchSource = "other"
    columns: tuple[int, ...] | None = None
    """Which entries of the site's vector; None for all. A head of attn_z, or single neurons."""


@dataclass(frozen=True)
class PatchedRun:
    """One patched forward: the base run with these patches, in order of layers."""

    patches: tuple[Patch, ...]


def cells_of(
    kind: Kind, atlas: Atlas, positions: Sequence[int] | Sequence[tuple[int, ...]], window: int
) -> list[list[PatchedRun]]:
    """The grid of cells of one kind, [layer][position].

    Args:
        kind: One of `KINDS`, or one of `HEAD_PARTS` with a number, "head:N".
        atlas: Of the model.
        positions: What each column of the grid restores: a position, or several at once.
        window: Layers restored together for "mlp" and "attn": at layer l the layers
            [l - window // 2, l - window // 2 + window), clipped (Meng et al. 2022: 10).

    Raises:
        InputError: an unknown kind or head.
    """
    columns = [(p,) if isinstance(p, int) else tuple(sorted(p)) for p in positions]
    return [
        [_cell(kind, atlas, layer, where, window) for where in columns] for layer in range(atlas.n_layers)
    ]


def _cell(kind: Kind, atlas: Atlas, layer: int, positions: tuple[int, ...], window: int) -> PatchedRun:
    one, last = (layer, layer + 1), atlas.n_layers
    first = layer - window // 2
    around = (max(0, first), min(last, first + window))
    match kind:
        case "block":
            return PatchedRun((Patch("resid_post", one, positions),))
        case "mlp":
            return PatchedRun((Patch("mlp_out", around, positions),))
        case "attn":
            return PatchedRun((Patch("attn_out", around, positions),))
        case "block-no-mlp":
            return PatchedRun(
                (Patch("resid_post", one, positions), Patch("mlp_out", (layer + 1, last), positions, "base"))
            )
        case "block-no-attn":
            return PatchedRun(
                (Patch("resid_post", one, positions), Patch("attn_out", (layer + 1, last), positions, "base"))
            )
    site, head = _head(kind, atlas)
    entries = tuple(range(head * atlas.d_head, (head + 1) * atlas.d_head))
    return PatchedRun((Patch(site, one, positions, columns=entries),))


def _head(kind: Kind, atlas: Atlas) -> tuple[Site, int]:
    """Site and head of "head:N", "query:N", "key:N", "value:N"."""
    name, _, number = kind.partition(":")
    if name not in HEAD_PARTS or not number.isdigit():
        some = [f"{part}:0 …" for part in HEAD_PARTS]
        raise InputError(f"kind {kind!r}: not one of {', '.join((*KINDS, *some))}")
    site = HEAD_PARTS[name]
    if site != "z" and not atlas.attn_q:
        raise InputError(
            f"kind {kind!r}: {atlas.architecture} makes queries, keys and values in one projection, where they have "
            "no names of their own; head:N restores what a head gives"
        )
    n_heads = atlas.n_heads if name in ("head", "query") else atlas.n_kv_heads
    if int(number) >= n_heads:
        raise InputError(f"kind {kind!r}: {atlas.architecture} has {name} heads 0 to {n_heads - 1}")
    return site, int(number)


def site_module(atlas: Atlas, site: Site, layer: int) -> tuple[str, Literal["output", "input"]]:
    """Module and side at which a site is read and written."""
    match site:
        case "resid_pre":
            return atlas.blocks[layer], "input"
        case "resid_post":
            return atlas.blocks[layer], "output"
        case "attn_out":
            return atlas.attn_out[layer], "output"
        case "mlp_out":
            return atlas.mlp_out[layer], "output"
        case "q":
            return atlas.attn_q[layer], "output"
        case "k":
            return atlas.attn_k[layer], "output"
        case "v":
            return atlas.attn_v[layer], "output"
        case "z":
            return atlas.attn_z[layer], "input"
        case "mlp_post":
            return atlas.neuron_in[layer], "input"


def sources_needed(cells: Sequence[PatchedRun]) -> tuple[frozenset[Site], frozenset[Site]]:
    """Sites to record in the other run and in the base run, so that every patch has its values."""
    wanted: dict[str, set[Site]] = {"other": set(), "base": set()}
    for cell in cells:
        for patch in cell.patches:
            if patch.source in wanted and patch.layers[0] < patch.layers[1]:
                wanted[patch.source].add(patch.site)
    return frozenset(wanted["other"]), frozenset(wanted["base"])
