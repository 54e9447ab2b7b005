"""What differs between two checkpoints: bits compared, in a stream, on a mask and off it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locus.checkpoint import Checkpoint
from locus.errors import InputError
from locus.files.tensorfile import n_threads
from locus.mask import WeightMask
from locus.parameter_names import canonical, resolve
from locus.progress import track
from locus.selection import Selection, same_bits

_PIECE = 1 << 20  # bytes compared at once


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that differs."""

    name: str
    n_entries: int
    n_changed: int
    """Entries whose bits differ (NaN equals itself, 0.0 is not -0.0)."""
    max_abs: float
    """Largest |b - a| over entries that are finite in both."""
    relative_norm: float
    """Euclidean norm of b - a over that of a, over finite entries."""
    n_nonfinite: int
    """Changed entries that are NaN or infinite in either."""
    n_on_mask: int | None = None
    """Changed entries on the mask; None where no mask was given."""
    n_off_mask: int | None = None
    """Changed entries off the mask; None where no mask was given."""


@dataclass(frozen=True)
class DiffReport:
    """What differs between two checkpoints."""

    tensors: tuple[TensorDiff, ...]
    """Tensors that differ, in order of name."""
    n_tensors: int
    """Tensors compared."""
    n_entries: int
    """Entries compared."""
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    reshaped: tuple[str, ...]
    """Tensors of another shape or dtype in b; they are not compared."""
    masked: bool
    """Whether a mask was given."""

    @property
    def n_changed(self) -> int:
        return sum(tensor.n_changed for tensor in self.tensors)

    @property
    def n_on_mask(self) -> int | None:
        return sum(tensor.n_on_mask or 0 for tensor in self.tensors) if self.masked else None

    @property
    def n_off_mask(self) -> int | None:
        return sum(tensor.n_off_mask or 0 for tensor in self.tensors) if self.masked else None

    @property
    def same(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.tensors or self.only_in_a or self.only_in_b or self.reshaped)

    @property
    def summary(self) -> str:
        """One line for a person."""
        counts = f"{self.n_changed:,} of {self.n_entries:,} weights differ"
        parts = [f"{counts}, in {len(self.tensors)} of {self.n_tensors} tensors"]
        if self.masked:
            parts.append(f"{self.n_on_mask:,} on the mask, {self.n_off_mask:,} off it")
        for what, names in (("only in the first", self.only_in_a), ("only in the second", self.only_in_b)):
            if names:
                parts.append(f"{len(names)} tensors {what} ({names[0]}, …)")
        if self.reshaped:
            parts.append(f"{len(self.reshaped)} of another shape or dtype ({self.reshaped[0]}, …)")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        totals = {"n_changed": self.n_changed, "n_on_mask": self.n_on_mask, "n_off_mask": self.n_off_mask}
        return {**asdict(self), **totals, "same": self.same}


def diff(
    a: str | Path | Checkpoint, b: str | Path | Checkpoint, mask: WeightMask | None = None
) -> DiffReport:
    """Compare two checkpoints bit by bit, in pieces: memory does not grow with their size.

    Tensors are matched by name, with or without the base model's prefix; sharding does not matter.

    Args:
        a: The base.
        b: The other one.
        mask: Count changed entries on it and off it.

    Raises:
        InputError: a folder cannot be read, or the mask is of another model.
    """
    a = a if isinstance(a, Checkpoint) else Checkpoint(a)
    b = b if isinstance(b, Checkpoint) else Checkpoint(b)
    pairs, only_in_a, reshaped = _matched(a, b)
    allowed = _allowed(a, mask)
    with ThreadPoolExecutor(n_threads()) as pool:
        work = pool.map(lambda name: _compared(a, b, name, pairs[name], allowed.get(name)), pairs)
        found = [one for one in track(work, "diff", len(pairs)) if one is not None]
    if mask is None:
        found = [replace(one, n_on_mask=None, n_off_mask=None) for one in found]
    return DiffReport(
        tensors=tuple(found),
        n_tensors=len(pairs),
        n_entries=sum(math.prod(a.shapes[name]) for name in pairs),
        only_in_a=only_in_a,
        only_in_b=tuple(sorted(set(b.shapes) - set(pairs.values()) - set(reshaped.values()))),
        reshaped=tuple(reshaped),
        masked=mask is not None,
    )


def same_bytes(a: Checkpoint, b: Checkpoint, name: str, other: str | None = None) -> bool:
    """Whether a tensor's bytes are the same in both; its name in `b` may be another."""
    pieces = _pieces(a, b, name, other or name, torch.uint8)
    return all(torch.equal(one, two) for one, two in pieces)


def _matched(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, str], tuple[str, ...], dict[str, str]]:
    """Pairs of names to compare, names only in a, and pairs of another shape or dtype."""
    known = {canonical(name) for name in b.shapes}
    pairs: dict[str, str] = {}
    reshaped: dict[str, str] = {}
    alone: list[str] = []
    for name in sorted(a.shapes):
        if name not in b.shapes and canonical(name) not in known:
            alone.append(name)
            continue
        other = resolve(name, b.shapes, str(b.folder))
        alike = (a.shapes[name], a.dtypes[name]) == (b.shapes[other], b.dtypes[other])
        (pairs if alike else reshaped)[name] = other
    return pairs, tuple(alone), reshaped


def _allowed(a: Checkpoint, mask: WeightMask | None) -> dict[str, Selection]:
    allowed: dict[str, Selection] = {}
    for name, selection in (mask.entries if mask else {}).items():
        for place in a.places(name):
            if a.shapes[place] != selection.shape:
                raise InputError(
                    f"mask: made for another model: {name} is {list(selection.shape)} in the mask and "
                    f"{list(a.shapes[place])} in {a.folder}"
                )
            allowed[place] = selection
    return allowed


def _compared(
    a: Checkpoint, b: Checkpoint, name: str, other: str, allowed: Selection | None
) -> TensorDiff | None:
    n_changed = n_nonfinite = n_on = offset = 0
    max_abs = norm_step = 0.0
    for one, two in _pieces(a, b, name, other, a.dtypes[name]):
        if not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            moved = (~same_bits(one, two)).nonzero().flatten()
            step = two[moved].double() - one[moved].double()
            finite = step[step.isfinite()].abs()
            n_changed += len(moved)
            n_nonfinite += len(moved) - len(finite)
            max_abs = max(max_abs, float(finite.max()) if len(finite) else 0.0)
            norm_step += float(finite.square().sum())
            n_on += int(allowed.contains(moved + offset).sum()) if allowed is not None else 0
        offset += len(one)
    if n_changed == 0:
        return None
    norm_a = _square_norm(a, name)
    relative = math.sqrt(norm_step / norm_a) if norm_a else float(bool(norm_step))
    n_entries = math.prod(a.shapes[name])
    return TensorDiff(name, n_entries, n_changed, max_abs, relative, n_nonfinite, n_on, n_changed - n_on)


def _square_norm(a: Checkpoint, name: str) -> float:
    """Sum of the squares of a tensor's finite entries."""
    total = 0.0
    for piece in a.files[a.file_of(name)].chunks(name, _PIECE):
        values = torch.frombuffer(piece, dtype=a.dtypes[name])
        narrow = values.float() if values.element_size() < 4 else values.double()
        square = float(torch.linalg.vector_norm(narrow)) ** 2
        if not math.isfinite(square):
            wide = values.double()
            square = float(wide[wide.isfinite()].square().sum())
        total += square
    return total


def _pieces(
    a: Checkpoint, b: Checkpoint, name: str, other: str, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors' bytes in pieces of the same length, as flat tensors of `dtype`; overwritten by the next."""
    files = a.files[a.file_of(name)], b.files[b.file_of(other)]
    for one, two in zip(files[0].chunks(name, _PIECE), files[1].chunks(other, _PIECE), strict=True):
        yield torch.frombuffer(one, dtype=dtype), torch.frombuffer(two, dtype=dtype)
