"""Patched runs on their way through the blocks: admitted where they leave the base run, read where it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.hooks import patched
from tracing.packing import INNER, Chunk, Packed, Track, rows_of
from tracing.question import Question
from tracing.runs import Runs
from tracing.sites import Patch, Site, module_of


@dataclass
class Work:
    """What all waves of a question share."""

    question: Question
    runs: Runs
    budget: int
    """Rows that go through a block at once."""
    rows_run: int = 0
    """Rows times blocks so far."""

    def positions(self, track: Track) -> list[int]:
        """Where a track has rows: behind its last layer only where it is read."""
        if track.entry >= self.runs.model.atlas.n_layers:
            return [r for r in self.question.reads if r >= track.start]
        return list(range(track.start, self.question.n_pos))


class Wave:
    """The states of some tracks, all held, while they go through the blocks side by side."""

    def __init__(self, work: Work, tracks: Sequence[Track]) -> None:
        self.work, self.tracks = work, tracks
        self.packed = Packed.of([work.positions(track) for track in tracks])
        self.starts = torch.tensor([track.start for track in tracks])
        self.restored = torch.tensor([track.restored_until for track in tracks])
        self.offsets = [0]
        for length in self.packed.lengths:
            self.offsets.append(self.offsets[-1] + length)
        self.admitted = 0
        model = work.runs.model
        self.device = work.runs.recorded.hidden[0].device
        self.states = torch.empty(
            len(self.packed.positions),
            work.question.samples,
            model.atlas.d_model,
            dtype=model.dtype,
            device=self.device,
        )
        self.is_read = torch.isin(self.packed.positions, torch.tensor(work.question.reads))

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
            base = self.work.runs.base.hidden(layer, self.packed.positions[rows])
            self.states[rows] = base.transpose(0, 1).to(self.states)
        inside = [i for i in new if self.tracks[i].enters_inside]
        if inside:
            self._enter_inside(inside, layer - 1)
        self._patch_states(new, layer - 1, "block_out")

    def through(self, layer: int) -> None:
        """Run all admitted tracks through a block that is not the last."""
        self._patch_states(range(self.admitted), layer, "block_in")
        active = self.packed.first(self.admitted)
        if not len(active.positions):
            return
        for pieces in active.calls(self.work.question.samples, self.work.budget):
            chunk = active.chunk(pieces)
            for draws in self._draws(len(chunk.source)):
                out = self._block(layer, chunk, draws)
                _put(self.states, chunk, draws, out)
        self._patch_states(range(self.admitted), layer, "block_out")

    def through_last(self, layer: int) -> None:
        """Run all admitted tracks through the last block, and only where they are read."""
        self._patch_states(range(self.admitted), layer, "block_in")
        active = self.packed.first(self.admitted)
        if not len(active.positions):
            return
        for pieces in active.calls(self.work.question.samples, 4 * self.work.budget):
            read = active.chunk(pieces, self.is_read[: len(active.positions)])
            rest = active.chunk(pieces, ~self.is_read[: len(active.positions)])
            for draws in self._draws(len(read.source) + len(rest.source)):
                out = self._block(layer, read, draws, before=rest if len(rest.source) else None)
                _put(self.states, read, draws, out)
        self._patch_states(range(self.admitted), layer, "block_out")

    def final(self) -> Float[Tensor, "track sample read d_model"]:
        """Outputs of the last block where they are read; the recorded ones where a track has no row."""
        work, reads = self.work, torch.tensor(self.work.question.reads)
        last = work.runs.model.atlas.n_layers
        base, other = work.runs.base.hidden(last, reads), work.runs.other.hidden(last, reads)
        out = base.expand(work.question.samples, -1, -1).repeat(len(self.tracks), 1, 1, 1)
        restored = reads[None, :] < self.restored[:, None]
        since = reads[None, :] >= work.runs.diverges
        for track, read in (restored & since).nonzero().tolist():
            out[track, :, read] = other[:, read]
        row = self.is_read.nonzero().flatten()
        column = torch.searchsorted(reads, self.packed.positions[row])
        out[self.packed.track[row], :, column] = self.states[row]
        return out

    def _draws(self, rows: int) -> list[slice]:
        """All draws at once, or some at a time where a track alone is too long for that."""
        samples = self.work.question.samples
        at_once = max(1, min(samples, self.work.budget // max(1, rows)))
        if rows * samples <= 2 * self.work.budget:
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
        n_draws = draws.stop - draws.start
        blocks, runs = self.work.runs.recorded.blocks, self.work.runs
        rows, n_base, n_other = rows_of(
            chunk, self.starts, self.restored, runs.diverges, n_draws, before, inside, self.device
        )
        prefix: list[tuple[Tensor, Tensor]] = [
            *self.work.runs.base.keys(layer, 0, n_base, draws),
            *self.work.runs.other.keys(layer, runs.diverges, runs.diverges + n_other, draws),
        ]
        states = self.states if states is None else states
        if before is not None:
            early, _, _ = rows_of(
                before, self.starts, self.restored, runs.diverges, n_draws, None, False, self.device
            )
            prefix.append(blocks.keys_only(layer, _take(states, before, draws), early))
            self.work.rows_run += len(before.source) * n_draws
        self.work.rows_run += len(chunk.source) * n_draws
        with self._patches_inside(layer, chunk, draws):
            return blocks(layer, _take(states, chunk, draws), rows, prefix)

    def _enter_inside(self, tracks: Sequence[int], layer: int) -> None:
        """Run block `layer` on the rows that a patch inside it changes; their inputs are the base run's."""
        work = self.work
        changed = []
        for i in tracks:
            own = set(self.tracks[i].positions_in(layer))
            changed.append([q for q in work.positions(self.tracks[i]) if q in own])
        packed = Packed.of(changed)
        of_wave = torch.tensor(list(tracks))[packed.track]
        packed = replace(packed, track=of_wave)
        states = work.runs.base.hidden(layer, packed.positions).transpose(0, 1)
        states = states.expand(-1, work.question.samples, -1).contiguous()
        for pieces in packed.calls(work.question.samples, work.budget):
            chunk = packed.chunk(pieces)
            for draws in self._draws(len(chunk.source)):
                _put(states, chunk, draws, self._block(layer, chunk, draws, inside=True, states=states))
        offsets = torch.tensor(self.offsets)[of_wave]
        first = torch.stack([self.packed.positions[o] for o in offsets]) if len(offsets) else offsets
        if work.runs.model.atlas.n_layers > layer + 1:
            self.states[offsets + packed.positions - first] = states
        else:
            for row, (track, position) in enumerate(
                zip(of_wave.tolist(), packed.positions.tolist(), strict=True)
            ):
                self.states[self._row(track, position)] = states[row]

    def _row(self, track: int, position: int) -> int:
        """Row of a position of a track."""
        here = self.packed.positions[self.offsets[track] : self.offsets[track + 1]]
        return self.offsets[track] + int((here == position).nonzero()[0])

    def _patch_states(self, tracks: Iterable[int], layer: int, site: Site) -> None:
        """Set what goes in or comes out of a block where a track patches it."""
        for i in tracks:
            track = self.tracks[i]
            for patch in track.patches:
                if patch.site != site or not patch.layers[0] <= layer < patch.layers[1]:
                    continue
                for q in patch.positions:
                    here = self.packed.positions[self.offsets[i] : self.offsets[i + 1]]
                    if q in here:
                        rows = torch.tensor([self._row(i, q)])
                        self._write(self.states[rows], rows, patch, site, layer, torch.tensor([q]))

    def _write(
        self, old: Tensor, rows: Tensor, patch: Patch, site: Site, layer: int, positions: Tensor
    ) -> None:
        new = self._value(patch, site, layer, positions, slice(None)).to(old)
        columns = slice(None) if patch.columns is None else list(patch.columns)
        old = old.clone()
        old[..., columns] = new.transpose(0, 1)[..., columns]
        self.states[rows] = old

    def _value(
        self, patch: Patch, site: Site, layer: int, positions: Int[Tensor, " k"], draws: slice
    ) -> Float[Tensor, "_ k _"]:
        """What a patch writes at each of these positions."""
        if patch.source in ("other", "base"):
            view = self.work.runs.other if patch.source == "other" else self.work.runs.base
            return view.site(site, layer, positions, draws)
        if patch.source == "mean":
            return self.work.question.means[site, layer].expand(1, len(positions), -1)
        width = self.work.runs.width(site)
        return torch.zeros(1, len(positions), width, device=self.device)

    def _patches_inside(self, layer: int, chunk: Chunk, draws: slice) -> AbstractContextManager[None]:
        """The hooks that patch attention, MLP, heads or neurons of one block for the rows of one call."""
        wanted: dict[Site, list[tuple[Patch, int, int]]] = {}
        flat_track, flat_position = chunk.track.flatten().tolist(), chunk.positions.flatten().tolist()
        for row, (track, position) in enumerate(zip(flat_track, flat_position, strict=True)):
            if track < 0:
                continue
            for patch in self.tracks[track].patches:
                if (
                    patch.site in INNER
                    and patch.layers[0] <= layer < patch.layers[1]
                    and position in patch.positions
                ):
                    wanted.setdefault(patch.site, []).append((patch, row, position))
        if not wanted:
            return nullcontext()
        outputs: dict[str, Callable[[Tensor], Tensor]] = {}
        inputs: dict[str, Callable[[Tensor], Tensor]] = {}
        for site, patches in wanted.items():
            name, side = module_of(self.work.runs.model.atlas, site, layer)
            hook = self._hook(site, layer, patches, chunk.track.shape[0], draws)
            (outputs if side == "output" else inputs)[name] = hook
        return patched(self.work.runs.model.module, outputs, inputs)

    def _hook(
        self, site: Site, layer: int, patches: Sequence[tuple[Patch, int, int]], groups: int, draws: slice
    ) -> Callable[[Tensor], Tensor]:
        alike: dict[tuple[str, tuple[int, ...] | None], list[tuple[Patch, int, int]]] = {}
        for item in patches:
            alike.setdefault((item[0].source, item[0].columns), []).append(item)

        def hook(state: Tensor) -> Tensor:
            batch, n, width = state.shape
            out = state.clone().view(groups, batch // groups, n, width)
            for (_, columns), items in alike.items():
                rows = torch.tensor([row for _, row, _ in items])
                positions = torch.tensor([position for _, _, position in items])
                new = self._value(items[0][0], site, layer, positions, draws).to(state).transpose(0, 1)
                where = (rows // n, slice(None), rows % n)
                if columns is None:
                    out[where] = new.expand(-1, batch // groups, -1)
                else:
                    old = out[where]
                    old[..., list(columns)] = new.expand(-1, batch // groups, -1)[..., list(columns)]
                    out[where] = old
            return out.view(batch, n, width)

        return hook


def _take(states: Tensor, chunk: Chunk, draws: slice) -> Float[Tensor, "batch n d_model"]:
    """The rows of one call, `group * draw` sequences."""
    groups, n = chunk.track.shape
    rows = states[:, draws].index_select(0, chunk.source.to(states.device))
    rows = rows.view(groups, n, rows.shape[1], -1).transpose(1, 2)
    return rows.reshape(-1, n, rows.shape[-1]).contiguous()


def _put(states: Tensor, chunk: Chunk, draws: slice, out: Float[Tensor, "batch n d_model"]) -> None:
    """Put a call's results where its rows came from."""
    groups, n = chunk.track.shape
    rows = out.view(groups, -1, n, out.shape[-1]).transpose(1, 2).flatten(0, 1)
    if chunk.kept is None:
        states[chunk.source, draws] = rows
    else:
        states[chunk.source[chunk.kept], draws] = rows[chunk.kept]
