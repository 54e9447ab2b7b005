"""The two unpatched runs of a question: one recorded whole, the other from where it diverges.

What stands before the divergence is the same in both and is kept once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.hooks import patched, record
from locus.model import Model
from tracing.patching.plain_engine import logits_of
from tracing.patching.runs import Inputs, PatchingQuestion, divergence
from tracing.patching.sites import Site, site_module
from tracing.replay.blocks import CannotReplay, Recorded, Rows, record_whole


class _Embedded(Exception):
    """The first block has been reached."""


@dataclass(frozen=True)
class RecordedStates:
    """Values of one run from position `start` on."""

    start: int
    hidden: tuple[Float[Tensor, "_ pos d_model"], ...]
    """Input of each block, then the output of the last."""
    keys: tuple[Float[Tensor, "_ head pos d_head"], ...]
    values: tuple[Float[Tensor, "_ head pos d_head"], ...]
    sites: Mapping[tuple[Site, int], Float[Tensor, "_ pos _"]]


@dataclass(frozen=True)
class View:
    """One run, put together of the part that both share and its own."""

    whole: RecordedStates
    own: RecordedStates | None
    """From the divergence on; None for the run that was recorded whole."""

    @property
    def samples(self) -> int:
        """Its draws."""
        return 1 if self.own is None else self.own.hidden[0].shape[0]

    def hidden(self, layer: int, positions: Int[Tensor, " k"]) -> Float[Tensor, "_ k d_model"]:
        """Inputs of a block at some positions; past the last block its outputs."""
        own = None if self.own is None else self.own.hidden[layer]
        return self._at(self.whole.hidden[layer], own, positions)

    def site(
        self, site: Site, layer: int, positions: Int[Tensor, " k"], draws: slice = slice(None)
    ) -> Float[Tensor, "_ k _"]:
        """Values of a site at some positions."""
        if site in ("resid_pre", "resid_post"):
            found = self.hidden(layer + (site == "resid_post"), positions)
        else:
            own = None if self.own is None else self.own.sites[site, layer]
            found = self._at(self.whole.sites[site, layer], own, positions)
        return found if found.shape[0] == 1 else found[draws]

    def keys(self, layer: int, start: int, stop: int, draws: slice) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the positions from `start` to `stop`, in at most two pieces."""
        whole = (self.whole.keys[layer], self.whole.values[layer])
        if stop <= start:
            return []
        if self.own is None:
            return [(whole[0][:, :, start:stop], whole[1][:, :, start:stop])]
        shared = min(stop, self.own.start)
        pieces = [(whole[0][:, :, start:shared], whole[1][:, :, start:shared])] if start < shared else []
        lo, hi = max(start, shared) - self.own.start, stop - self.own.start
        if hi > lo:
            own = (self.own.keys[layer][draws, :, lo:hi], self.own.values[layer][draws, :, lo:hi])
            pieces.append(own)
        return pieces

    def _at(self, whole: Tensor, own: Tensor | None, positions: Tensor) -> Tensor:
        if own is None or self.own is None:
            return whole[:, positions]
        before = positions < self.own.start
        if not bool(before.any()):
            return own[:, positions - self.own.start]
        out = own[:, (positions - self.own.start).clamp(min=0)].clone() if own.shape[1] else None
        shared = whole[:, positions].expand(self.samples, -1, -1)
        return shared if out is None else torch.where(before[None, :, None].to(out.device), shared, out)


@dataclass(frozen=True)
class Runs:
    """Both runs of a question."""

    recorded: Recorded
    base: View
    other: View
    diverges: int
    """First position where they differ."""
    rows_run: int
    """Rows times blocks that recording took."""

    @property
    def model(self) -> Model:
        """Whose runs they are."""
        return self.recorded.blocks.model

    @property
    def samples(self) -> int:
        """Draws of the run that has more."""
        return max(self.base.samples, self.other.samples)

    def width(self, site: Site) -> int:
        """Width of a site's vector."""
        atlas = self.model.atlas
        queries, keys = atlas.n_heads * atlas.d_head, atlas.n_kv_heads * atlas.d_head
        widths = {"q": queries, "k": keys, "v": keys, "z": queries, "mlp_post": atlas.d_mlp}
        return widths.get(site, atlas.d_model)


def record_runs(
    model: Model,
    question: PatchingQuestion,
    other_sites: Iterable[Site],
    base_sites: Iterable[Site],
    budget: int,
) -> Runs:
    """Record both runs, with the sites that patches need.

    Raises:
        CannotReplay: the model is not understood, or both runs have several draws.
    """
    base_is_whole = question.base.samples == 1
    whole, branch = (question.base, question.other) if base_is_whole else (question.other, question.base)
    if whole.samples > 1:
        raise CannotReplay("both runs have several draws")
    sites = sorted((set(other_sites) | set(base_sites)) - {"resid_pre", "resid_post"})
    atlas = model.atlas
    names = {
        (site, layer): site_module(atlas, site, layer) for site in sites for layer in range(atlas.n_layers)
    }
    outputs = [name for name, side in names.values() if side == "output"]
    inputs = [name for name, side in names.values() if side == "input"]
    recorded = record_whole(model, whole, question.reads, outputs, inputs)
    found = {
        key: (recorded.outputs if side == "output" else recorded.inputs)[name]
        for key, (name, side) in names.items()
    }
    states = RecordedStates(0, recorded.hidden, recorded.keys, recorded.values, found)
    diverges = divergence(question)
    own, rows = None, atlas.n_layers * question.n_pos
    if diverges < question.n_pos:
        own = _branch(model, branch, recorded, states, diverges, names, budget)
        rows += atlas.n_layers * branch.samples * (question.n_pos - diverges)
    first, second = View(states, None), View(states, own)
    base, other = (first, second) if base_is_whole else (second, first)
    return Runs(recorded, base, other, diverges, rows)


def _branch(
    model: Model,
    inputs: Inputs,
    recorded: Recorded,
    whole: RecordedStates,
    start: int,
    names: Mapping[tuple[Site, int], tuple[str, str]],
    budget: int,
) -> RecordedStates:
    """The run that diverges, from where it does, attending to the whole run before that."""
    n_layers, n = model.atlas.n_layers, len(inputs.ids) - start
    at_once = max(1, budget // n)
    parts = []
    for first in range(0, inputs.samples, at_once):
        draws = slice(first, min(first + at_once, inputs.samples))
        parts.append(_branch_draws(model, inputs, recorded, whole, start, names, draws))
    if len(parts) == 1:
        return parts[0]

    def joined(of: str, layer: int) -> Tensor:
        return torch.cat([getattr(part, of)[layer] for part in parts])

    return RecordedStates(
        start,
        tuple(joined("hidden", layer) for layer in range(n_layers + 1)),
        tuple(joined("keys", layer) for layer in range(n_layers)),
        tuple(joined("values", layer) for layer in range(n_layers)),
        {key: torch.cat([part.sites[key] for part in parts]) for key in names},
    )


def _branch_draws(
    model: Model,
    inputs: Inputs,
    recorded: Recorded,
    whole: RecordedStates,
    start: int,
    names: Mapping[tuple[Site, int], tuple[str, str]],
    draws: slice,
) -> RecordedStates:
    some = (
        inputs
        if inputs.embeddings is None
        else Inputs(inputs.ids, inputs.positions, inputs.embeddings[draws])
    )
    hidden = [_first_input(model, some)[:, start:].contiguous()]
    n_pos = len(inputs.ids)
    own = torch.arange(start, n_pos, device=hidden[0].device)[None]
    places = torch.arange(n_pos, device=hidden[0].device)[None]
    visible = torch.ones(1, n_pos - start, n_pos, dtype=torch.bool, device=hidden[0].device)
    rows = Rows(own, places, visible, some.samples)
    keys, values, sites = [], [], {}
    for layer in range(model.atlas.n_layers):
        here = {key: names[key] for key in names if key[1] == layer}
        outputs = [name for name, side in here.values() if side == "output"]
        entries = [name for name, side in here.values() if side == "input"]
        prefix = [(whole.keys[layer][:, :, :start], whole.values[layer][:, :, :start])] if start else []
        with record(model.module, outputs, entries) as seen:
            out, (k, v) = recorded.blocks.with_keys(layer, hidden[-1], rows, prefix)
        hidden.append(out)
        keys.append(k)
        values.append(v)
        for key, (name, side) in here.items():
            sites[key] = (seen.outputs if side == "output" else seen.inputs)[name]
    return RecordedStates(start, tuple(hidden), tuple(keys), tuple(values), sites)


def _first_input(model: Model, inputs: Inputs) -> Float[Tensor, "_ pos d_model"]:
    """What the first block is called with."""
    caught: list[Tensor] = []
    catch = {model.atlas.blocks[0]: partial(_catch, caught)}
    with contextlib.suppress(_Embedded), patched(model.module, inputs=catch):
        logits_of(model, inputs, (0,), inputs.samples)
    return caught[0]


def _catch(into: list[Tensor], hidden: Tensor) -> Tensor:
    into.append(hidden.clone())
    raise _Embedded
