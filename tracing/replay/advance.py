"""Patched runs on their way through the blocks: admitted where they leave the base run, read where it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from locus.hooks import patched
from tracing.patching.sites import Patch, Site, site_module
from tracing.replay.blocks import Rows
from tracing.replay.context import ReplayContext
from tracing.replay.packing import INNER, Chunk, Packed, Track, rows_of


class PatchedRows:
    """The states of some tracks, all held, while they go through the blocks side by side."""

    def __init__(self, context: ReplayContext, tracks: Sequence[Track]) -> None:
        self.context, self.tracks = context, tracks
        positions = [context.positions(track) for track in tracks]
        self.packed = Packed.of_tracks(positions, [track.of for track in tracks])
        self.starts = torch.tensor([track.start for track in tracks])
        self.restored = torch.tensor([track.restored_until for track in tracks])
        self.of = torch.tensor([track.of for track in tracks])
        self.diverges = torch.tensor([context.runs[track.of].diverges for track in tracks])
        self.offsets = [0, *accumulate(self.packed.lengths)]
        self.row = {
            (i, q): self.offsets[i] + n for i, held in enumerate(positions) for n, q in enumerate(held)
        }
        self.admitted = 0
        self.device = context.device
        shape = (len(self.packed.positions), context.samples, context.blocks.model.atlas.d_model)
        self.states = torch.empty(shape, dtype=context.runs[0].recorded.hidden[0].dtype, device=self.device)
        last = torch.zeros(len(tracks), max(q.n_pos for q in context.questions), dtype=torch.bool)
        for i, track in enumerate(tracks):
            last[i, list(context.questions[track.of].reads)] = True
        self.is_read = last[self.packed.track, self.packed.positions]

    def admit(self, layer: int) -> None:
        """Put in the inputs of block `layer` of the tracks that enter there."""
        stop = self.admitted
        while stop < len(self.tracks) and self.tracks[stop].entry == layer:
            stop += 1
        new = range(self.admitted, stop)
        self.admitted = stop
        if not new:
            return
        rows = slice(self.offsets[new.start], self.offsets[new.stop])
        if rows.stop > rows.start:
            of, positions = self.of[self.packed.track[rows]], self.packed.positions[rows]
            self.states[rows] = self.context.base_hidden(layer, of, positions)
        inside = [i for i in new if self.tracks[i].enters_inside]
        if inside:
            self._enter_inside(inside, layer - 1)
        self._patch_states(new, layer - 1, "resid_post")

    def through(self, layer: int) -> None:
        """Run all admitted tracks through a block that is not the last."""
        self._patch_states(range(self.admitted), layer, "resid_pre")
        active = self.packed.first(self.admitted)
        if not len(active.positions):
            return
        for pieces in active.calls(self.context.samples, self.context.budget):
            chunk = active.chunk(pieces)
            for draws in self._draws(len(chunk.source)):
                out = self._block(layer, chunk, draws)
                _put(self.states, chunk, draws, out)
        self._patch_states(range(self.admitted), layer, "resid_post")

    def through_last(self, layer: int) -> None:
        """Run all admitted tracks through the last block, and only where they are read."""
        self._patch_states(range(self.admitted), layer, "resid_pre")
        active = self.packed.first(self.admitted)
        if not len(active.positions):
            return
        for pieces in active.calls(self.context.samples, 4 * self.context.budget):
            is_read = self.is_read[active.rows]
            read = active.chunk(pieces, is_read)
            rest = active.chunk(pieces, ~is_read)
            for draws in self._draws(len(read.source) + len(rest.source)):
                out = self._block(layer, read, draws, before=rest if len(rest.source) else None)
                _put(self.states, read, draws, out)
        self._patch_states(range(self.admitted), layer, "resid_post")

    def final(self, of: int) -> tuple[list[int], Float[Tensor, "track sample read d_model"]]:
        """The tracks of one question, and outputs of the last block where they are read; the recorded ones where a
        track has no row."""
        context, tracks = self.context, (self.of == of).nonzero().flatten()
        reads, runs = torch.tensor(context.questions[of].reads), context.runs[of]
        base, other = runs.base.hidden(context.n_layers, reads), runs.other.hidden(context.n_layers, reads)
        out = base.expand(context.samples, -1, -1).repeat(len(tracks), 1, 1, 1).to(self.device)
        restored = reads[None, :] < self.restored[tracks][:, None]
        since = reads[None, :] >= runs.diverges
        for track, read in (restored & since).nonzero().tolist():
            out[track, :, read] = other[:, read].to(out)
        row = (self.is_read & (self.of[self.packed.track] == of)).nonzero().flatten()
        column = torch.searchsorted(reads, self.packed.positions[row])
        out[torch.searchsorted(tracks, self.packed.track[row]), :, column] = self.states[row]
        return tracks.tolist(), out

    def _draws(self, rows: int) -> list[slice]:
        """All draws at once, or some at a time where a track alone is too long for that."""
        samples = self.context.samples
        at_once = max(1, min(samples, self.context.budget // max(1, rows)))
        if rows * samples <= 2 * self.context.budget:
            at_once = samples
        return [slice(i, min(i + at_once, samples)) for i in range(0, samples, at_once)]

    def _block(
        self,
        layer: int,
        chunk: Chunk,
        draws: slice,
        before: Chunk | None = None,
        inside: bool = False,
        states: Tensor | None = None,
    ) -> Float[Tensor, "batch n d_model"]:
        """One call of a block."""
        n_draws, blocks = draws.stop - draws.start, self.context.blocks
        of = self.of[chunk.track.amax(dim=1)]
        rows, n_base, n_other = self._rows(chunk, n_draws, before, inside)
        prefix = self.context.prefix(layer, of, n_base, n_other, draws)
        states = self.states if states is None else states
        if before is not None:
            early, _, _ = self._rows(before, n_draws)
            with self._patches_inside(layer, before, draws):
                prefix.append(blocks.keys_only(layer, _take(states, before, draws), early))
        n_rows = chunk.track.shape[1] + (before.track.shape[1] if before is not None else 0)
        for question in of.tolist():
            self.context.rows_run[question] += n_rows * n_draws
        with self._patches_inside(layer, chunk, draws):
            return blocks(layer, _take(states, chunk, draws), rows, prefix)

    def _rows(
        self, chunk: Chunk, draws: int, before: Chunk | None = None, inside: bool = False
    ) -> tuple[Rows, int, int]:
        return rows_of(chunk, self.starts, self.restored, self.diverges, draws, before, inside, self.device)

    def _enter_inside(self, tracks: Sequence[int], layer: int) -> None:
        """Run block `layer` on the rows that a patch inside it changes; their inputs are the base run's."""
        context = self.context
        changed = []
        for i in tracks:
            own = set(self.tracks[i].positions_in(layer))
            changed.append([q for q in context.positions(self.tracks[i]) if q in own])
        packed = Packed.of_tracks(changed, [self.tracks[i].of for i in tracks], tracks).first(len(tracks))
        held = torch.tensor([self.row[i, q] for i, here in zip(tracks, changed, strict=True) for q in here])
        if not len(held):
            return
        by_row = torch.argsort(packed.rows)
        states = context.base_hidden(layer, self.of[packed.track[by_row]], packed.positions[by_row])
        for pieces in packed.calls(context.samples, context.budget):
            chunk = packed.chunk(pieces)
            for draws in self._draws(len(chunk.source)):
                _put(states, chunk, draws, self._block(layer, chunk, draws, inside=True, states=states))
        self.states[held] = states

    def _patch_states(self, tracks: Iterable[int], layer: int, site: Site) -> None:
        """Set what goes in or comes out of a block where a track patches it."""
        places = [
            PatchedRow(patch, self.tracks[i].of, self.row[i, q], q)
            for i in tracks
            for patch in self.tracks[i].patches
            if patch.site == site and patch.layers[0] <= layer < patch.layers[1]
            for q in patch.positions
            if (i, q) in self.row
        ]
        for alike in _alike(places):
            rows = torch.tensor([place.row for place in alike])
            new = self._new(alike, site, layer, slice(None)).to(self.states)
            columns = alike[0].patch.columns
            if columns is None:
                self.states[rows] = new.expand(-1, self.context.samples, -1)
            else:
                self.states[rows[:, None], :, torch.tensor(columns)] = new[..., list(columns)].transpose(1, 2)

    def _new(
        self, alike: Sequence[PatchedRow], site: Site, layer: int, draws: slice
    ) -> Float[Tensor, "place _ _"]:
        positions = torch.tensor([place.position for place in alike])
        new = self.context.value(alike[0].of, alike[0].patch, site, layer, positions, draws)
        return new.transpose(0, 1)

    def _patches_inside(self, layer: int, chunk: Chunk, draws: slice) -> AbstractContextManager[None]:
        """The hooks that patch attention, MLP, heads or neurons of one block for the rows of one call."""
        inner = {
            i: found for i in chunk.track.unique().tolist() if i >= 0 and (found := self._inner(i, layer))
        }
        if not inner:
            return nullcontext()
        wanted: dict[Site, list[PatchedRow]] = {}
        track, position = chunk.track.flatten(), chunk.positions.flatten()
        rows = torch.isin(track, torch.tensor(list(inner))).nonzero().flatten()
        for row, i, q in zip(rows.tolist(), track[rows].tolist(), position[rows].tolist(), strict=True):
            for patch in inner[i]:
                if q in patch.positions:
                    wanted.setdefault(patch.site, []).append(PatchedRow(patch, self.tracks[i].of, row, q))
        outputs: dict[str, Callable[[Tensor], Tensor]] = {}
        inputs: dict[str, Callable[[Tensor], Tensor]] = {}
        model = self.context.blocks.model
        for site, places in wanted.items():
            name, side = site_module(model.atlas, site, layer)
            hook = partial(self._written, site, layer, places, chunk.track.shape[0], draws)
            (outputs if side == "output" else inputs)[name] = hook
        return patched(model.module, outputs, inputs) if wanted else nullcontext()

    def _inner(self, track: int, layer: int) -> list[Patch]:
        """Patches of a track inside one block."""
        return [
            p for p in self.tracks[track].patches if p.site in INNER and p.layers[0] <= layer < p.layers[1]
        ]

    def _written(
        self, site: Site, layer: int, places: Sequence[PatchedRow], groups: int, draws: slice, state: Tensor
    ) -> Tensor:
        """What flows through one site, with the patches of the rows that have some."""
        batch, n, width = state.shape
        out = state.clone().view(groups, batch // groups, n, width)
        for alike in _alike(places):
            rows = torch.tensor([place.row for place in alike])
            new = self._new(alike, site, layer, draws).to(state)
            where = (rows // n, slice(None), rows % n)
            columns = alike[0].patch.columns
            if columns is None:
                out[where] = new.expand(-1, batch // groups, -1)
            else:
                old = out[where]
                old[..., list(columns)] = new.expand(-1, batch // groups, -1)[..., list(columns)]
                out[where] = old
        return out.view(batch, n, width)


@dataclass(frozen=True)
class PatchedRow:
    """One row that a patch overwrites."""

    patch: Patch
    of: int
    """Question."""
    row: int
    position: int


def _alike(places: Sequence[PatchedRow]) -> list[list[PatchedRow]]:
    """Places whose values come from the same source, and can be written together."""
    groups: dict[tuple[int, str, tuple[int, ...] | None], list[PatchedRow]] = {}
    for place in places:
        groups.setdefault((place.of, place.patch.source, place.patch.columns), []).append(place)
    return list(groups.values())


def _take(states: Tensor, chunk: Chunk, draws: slice) -> Float[Tensor, "batch n d_model"]:
    """The rows of one call, `group * draw` sequences."""
    groups, n = chunk.track.shape
    rows = states[:, draws].index_select(0, chunk.source.to(states.device))
    rows = rows.view(groups, n, rows.shape[1], -1).transpose(1, 2)
    return rows.reshape(-1, n, rows.shape[-1]).contiguous()


def _put(states: Tensor, chunk: Chunk, draws: slice, out: Float[Tensor, "batch n d_model"]) -> None:
    """Put a call's results where its rows came from."""
    groups, n = chunk.track.shape
    rows = out.view(groups, -1, n, out.shape[-1]).transpose(1, 2).flatten(0, 1).to(states.device)
    if chunk.kept is None:
        states[chunk.source, draws] = rows
    else:
        states[chunk.source[chunk.kept], draws] = rows[chunk.kept]
