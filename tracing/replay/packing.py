"""Which rows travel together: patched runs packed side by side, in batches and chunks of bounded size.

A patch at (layer l, position t) changes only rows of positions >= t from layer l on. Those rows of one run are a
`Track`. Many tracks, of any length and of any position, are packed one behind the other into a sequence; a mask
keeps each to itself, so that nothing is padded and the recorded prefix is shared by all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tracing.patching.sites import Patch, PatchedRun
from tracing.replay.blocks import Rows

INNER = ("attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post")
_SEEN_LATER = ("resid_pre", "k", "v")
"""Sites that change later positions of their own block too, so that all rows go through it."""

_MIN_SEQUENCE = 64
"""Rows of one packed sequence: more make attention over each other's masked keys expensive, fewer copy the prefix
more often."""


@dataclass(frozen=True)
class Track:
    """One patched run from where it leaves the base run."""

    cell: int
    """Index of its cell."""
    patches: tuple[Patch, ...]
    """Those that change something."""
    entry: int
    """First block that all of its rows go through; the number of layers where only the last output changes."""
    start: int
    """Position from which on it differs from the base run, and its rows begin."""
    of: int = 0
    """Index of its question."""
    restored_until: int = 0
    """Positions from the divergence up to here are the other run's in every later layer: their rows are not
    computed, their keys are the other run's. 0 where there are none."""

    @property
    def enters_inside(self) -> bool:
        """Whether the first patch lies inside a block, whose changed rows are run before the others join."""
        return any(p.site in INNER and p.layers[0] == self.entry - 1 for p in self.patches)

    def positions_in(self, layer: int, sites: Sequence[str] = INNER) -> tuple[int, ...]:
        """Positions that some patch changes at these sites of one layer."""
        found = {
            q
            for p in self.patches
            if p.site in sites and p.layers[0] <= layer < p.layers[1]
            for q in p.positions
        }
        return tuple(sorted(found))


def track_of(
    index: int, cell: PatchedRun, diverges: int, n_layers: int, reads: Sequence[int], of: int = 0
) -> Track | None:
    """What has to be computed for a cell; None where the positions that are read are as in the base run.

    Args:
        index: The cell's.
        cell: The patched forward.
        diverges: First position where the two runs differ: before it a patch from either changes nothing.
        n_layers: Of the model.
        reads: Positions whose last output counts.
        of: Index of the cell's question.
    """
    patches = _effective(cell.patches, diverges)
    if not patches:
        return None
    first = min(p.layers[0] for p in patches)
    at_first = [p for p in patches if p.layers[0] == first]
    entry = first if any(p.site in _SEEN_LATER for p in at_first) else first + 1
    changed = {q for p in patches for q in p.positions}
    if entry >= n_layers and not changed & set(reads):
        return None
    start = min(changed)
    track = Track(index, patches, min(entry, n_layers), start, of)
    until = _restored_until(patches, diverges)
    return track if until is None else replace(track, start=until, restored_until=until)


def _effective(patches: Sequence[Patch], diverges: int) -> tuple[Patch, ...]:
    """The patches that change something, at the positions where they do."""
    kept: list[Patch] = []
    for patch in sorted(patches, key=lambda p: p.layers[0]):
        if patch.layers[0] >= patch.layers[1]:
            continue
        same = patch.source in ("other", "base")
        positions = tuple(q for q in patch.positions if not (same and q < diverges))
        pins_nothing_yet = patch.source == "base" and not any(p.layers[0] <= patch.layers[0] for p in kept)
        if positions and not pins_nothing_yet:
            kept.append(replace(patch, positions=positions))
    return tuple(kept)


def _restored_until(patches: tuple[Patch, ...], diverges: int) -> int | None:
    """End of a stretch, from the divergence on, that is the other run's from the first patch on."""
    first = patches[0]
    if (
        len(patches) > 1
        or first.site not in ("resid_pre", "resid_post")
        or first.layers[1] - first.layers[0] > 1
    ):
        return None
    whole = first.source == "other" and first.columns is None
    stretch = tuple(range(diverges, diverges + len(first.positions)))
    return stretch[-1] + 1 if whole and first.positions == stretch else None


@dataclass(frozen=True)
class Chunk:
    """Rows of some tracks that go through a block together, in `group` sequences of equal length."""

    track: Int[Tensor, "group n"]
    """Track of each row; -1 for padding."""
    positions: Int[Tensor, "group n"]
    """0 for padding."""
    source: Int[Tensor, " group_n"]
    """Which of the held rows each row is; padding repeats one."""
    kept: Bool[Tensor, " group_n"] | None
    """False for padding; None where there is none."""


@dataclass(frozen=True)
class Packed:
    """Rows of tracks, one behind the other; rows of a track are neighbours, in order of position."""

    rows: Int[Tensor, " row"]
    """Which of the held rows each is."""
    track: Int[Tensor, " row"]
    positions: Int[Tensor, " row"]
    lengths: tuple[int, ...]
    """Rows of each track."""
    of: tuple[int, ...]
    """Question of each track; those of one question are neighbours."""

    @classmethod
    def of_tracks(
        cls,
        positions: Sequence[Sequence[int]],
        of: Sequence[int] | None = None,
        names: Sequence[int] | None = None,
    ) -> Packed:
        """Pack tracks whose rows stand at these positions.

        Args:
            positions: Of each track's rows.
            of: Each track's question; None for a single one.
            names: What each track is called; None for 0, 1, …
        """
        lengths = tuple(len(p) for p in positions)
        called = torch.arange(len(lengths)) if names is None else torch.tensor(list(names), dtype=torch.long)
        track = torch.repeat_interleave(called, torch.tensor(lengths, dtype=torch.long))
        flat = torch.tensor([q for p in positions for q in p], dtype=torch.long)
        return cls(torch.arange(len(flat)), track, flat, lengths, tuple(of or [0] * len(lengths)))

    def first(self, n_tracks: int) -> Packed:
        """Only the first tracks, those of one question behind each other."""
        lengths, of = self.lengths[:n_tracks], self.of[:n_tracks]
        n = sum(lengths)
        if len(set(of)) < 2:
            return Packed(self.rows[:n], self.track[:n], self.positions[:n], lengths, of)
        order = sorted(range(n_tracks), key=lambda i: of[i])
        offsets = [0, *accumulate(lengths)]
        picked = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in order])
        return Packed(
            self.rows[picked],
            self.track[picked],
            self.positions[picked],
            tuple(lengths[i] for i in order),
            tuple(of[i] for i in order),
        )

    def calls(self, draws: int, budget: int) -> list[list[slice]]:
        """Divide between tracks into calls of about `budget` rows (times draws), each of some sequences of rows.

        A track is never divided, so that a call may be as large as the longest of them.
        """
        per_call = max(1, budget // draws)
        longest = max(self.lengths)
        pieces = self._pieces(max(longest, min(per_call, max(_MIN_SEQUENCE, longest))))
        at_once = max(1, per_call // max(piece.stop - piece.start for piece in pieces))
        n_calls = math.ceil(len(pieces) / at_once)
        edges = [i * len(pieces) // n_calls for i in range(n_calls + 1)]
        return [pieces[lo:hi] for lo, hi in pairwise(edges)]

    def _pieces(self, size: int) -> list[slice]:
        """Sequences of about equal length and of one question each, at most `size` rows unless one track is longer."""
        target = sum(self.lengths) / math.ceil(sum(self.lengths) / size)
        pieces, start, rows, last = [], 0, 0, -1
        for length, of in zip(self.lengths, self.of, strict=True):
            if rows and (of != last or rows + length > size or rows + length / 2 > target):
                pieces.append(slice(start, start + rows))
                start, rows = start + rows, 0
            rows, last = rows + length, of
        return [*pieces, slice(start, start + rows)] if rows else pieces

    def chunk(self, pieces: Sequence[slice], wanted: Bool[Tensor, " row"] | None = None) -> Chunk:
        """The rows of these sequences, or those of them that are wanted, as one call."""
        rows = [torch.arange(piece.start, piece.stop) for piece in pieces]
        if wanted is not None:
            rows = [r[wanted[r]] for r in rows]
        n = max(len(r) for r in rows)
        source = torch.zeros(len(rows), n, dtype=torch.long)
        real = torch.zeros(len(rows), n, dtype=torch.bool)
        for i, r in enumerate(rows):
            source[i, : len(r)], real[i, : len(r)] = r, True
        track = torch.where(real, self.track[source], -1) if n else source
        positions = torch.where(real, self.positions[source], 0) if n else source
        kept = None if bool(real.all()) else real.flatten()
        return Chunk(track, positions, self.rows[source.flatten()], kept)


def rows_of(
    chunk: Chunk,
    starts: Int[Tensor, " track"],
    restored: Int[Tensor, " track"],
    diverges: Int[Tensor, " track"],
    draws: int,
    before: Chunk | None = None,
    inside: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Rows, int, int]:
    """Which keys each row of a chunk sees: the base run's before its track, the other run's where restored.

    Args:
        chunk: The rows.
        starts: First position of each track.
        restored: `restored_until` of each track.
        diverges: First position where the two runs of each track's question differ.
        draws: Batch elements a sequence.
        before: Rows of the same tracks whose keys were made by an earlier call, to be put before this one's.
        inside: The rows' inputs are the base run's: they see its keys, and not each other's.
        device: Of the model.

    Returns:
        The rows, how many of the base run's keys they need, and how many of the other run's from the divergence on.
    """
    known = chunk.track >= 0
    start, until, since = (
        torch.where(known, of_track[chunk.track], 0)[..., None] for of_track in (starts, restored, diverges)
    )
    n_base = int(chunk.positions.max()) + 1 if inside else int(start.max())
    n_other = 0 if inside else max(0, int((until - since).max()))
    base = torch.arange(n_base)
    other = since.amax(dim=1) + torch.arange(n_other)
    groups, n = chunk.track.shape
    sees_base = (
        (base < n_base).expand(groups, n, -1)
        if inside
        else (base < start) & ((base < since) | (base >= until))
    )
    parts = [sees_base, other[:, None] < until]
    places = [base.expand(groups, -1), torch.minimum(other, (until.amax(dim=1) - 1).clamp(min=0))]
    for keys in ([before] if before is not None else []) + [chunk]:
        parts.append(chunk.track[:, :, None] == keys.track[:, None, :])
        places.append(keys.positions)
    visible = torch.cat([part.expand(groups, n, -1) for part in parts], dim=-1)
    if inside:
        visible[..., n_base:] = False
        visible[..., 0] |= ~known
    rows = Rows(chunk.positions.to(device), torch.cat(places, dim=-1).to(device), visible.to(device), draws)
    return rows, n_base, n_other
