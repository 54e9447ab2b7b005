"""The change of one tensor: old and new values of a selection, in the checkpoint's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from locus.errors import InputError
from locus.files.tensorfile import TensorFile
from locus.selection import Selection, same_bits


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one tensor."""

    selection: Selection
    """Holds every changed entry, and unchanged neighbours where that is smaller to store."""
    old: Tensor
    """What `selection.take` gave before, in the checkpoint's dtype."""
    new: Tensor
    """What it gives after."""

    @property
    def n_changed(self) -> int:
        """Entries whose bits differ."""
        return int((~same_bits(self.old, self.new)).sum())

    @property
    def norm(self) -> float:
        """Euclidean norm of new - old, over finite entries."""
        return _norm(self.new.double() - self.old.double())

    @property
    def relative_norm(self) -> float:
        """`norm` over the norm of the selected old entries."""
        return self.norm / max(_norm(self.old.double()), 1e-300)

    def inverse(self) -> Change:
        """The change that undoes this one."""
        return Change(self.selection, self.new, self.old)


@dataclass(frozen=True)
class Rounding:
    """What casting an edit to the checkpoint's dtype cost."""

    n_wanted: int = 0
    """Entries that the edit changed in the dtype it was made in."""
    n_vanished: int = 0
    """Of those, entries that the cast took back to their old bits."""
    norm_wanted: float = 0.0
    """Euclidean norm of the edit before the cast."""
    norm_lost: float = 0.0
    """Euclidean norm of what the cast took away or added."""

    @property
    def fraction_vanished(self) -> float:
        return self.n_vanished / max(1, self.n_wanted)

    @property
    def relative_norm_lost(self) -> float:
        return self.norm_lost / self.norm_wanted if self.norm_wanted else 0.0

    def to_json(self) -> dict[str, int | float]:
        """Fields and shares, as JSON values."""
        shares = {"fraction_vanished": self.fraction_vanished, "relative_norm_lost": self.relative_norm_lost}
        return {**asdict(self), **shares}

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.n_wanted + other.n_wanted,
            self.n_vanished + other.n_vanished,
            (self.norm_wanted**2 + other.norm_wanted**2) ** 0.5,
            (self.norm_lost**2 + other.norm_lost**2) ** 0.5,
        )


class StoredChanges(Mapping[str, Change]):
    """Changes that are read from a delta's file when they are asked for."""

    def __init__(self, file: TensorFile, entries: Mapping[str, tuple[object, tuple[object, ...]]]) -> None:
        self._file, self._entries = file, entries

    def __getitem__(self, name: str) -> Change:
        selection = self.selection(name)
        return Change(selection, self.half(name, selection, "old"), self.half(name, selection, "new"))

    def selection(self, name: str) -> Selection:
        """Where the change is, without its values."""
        form, shape = self._entries[name]
        index = self._file.read(f"{name}:index") if f"{name}:index" in self._file.tensors else None
        return Selection.restored(form, index, shape)

    def half(self, name: str, selection: Selection, side: Literal["old", "new"]) -> Tensor:
        """The old or the new values."""
        values = [self._file.tensors[f"{name}:{both}"] for both in ("old", "new")]
        if (
            len({(info.dtype, info.shape) for info in values} | {(values[0].dtype, selection.compact_shape)})
            > 1
        ):
            raise ValueError(f"{name}: values do not fit its selection")
        return self._file.read(f"{name}:{side}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class InvertedChanges(Mapping[str, Change]):
    """Changes turned round when they are asked for."""

    def __init__(self, changes: Mapping[str, Change]) -> None:
        self.changes = changes

    def __getitem__(self, name: str) -> Change:
        return self.changes[name].inverse()

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)


def new_values(changes: Mapping[str, Change], name: str) -> tuple[Selection, Tensor]:
    """Where a change is and what it writes, without reading what it overwrites where that is on the disk."""
    side: Literal["old", "new"] = "new"
    while isinstance(changes, InvertedChanges):
        changes, side = changes.changes, "old" if side == "new" else "new"
    if isinstance(changes, StoredChanges):
        selection = changes.selection(name)
        return selection, changes.half(name, selection, side)
    change = changes[name]
    return change.selection, change.new if side == "new" else change.old


def composed(first: Change, second: Change) -> Change:
    """Both changes of one tensor as one. Entries outside both selections stay zero here and are not kept."""
    old, new = (torch.zeros(first.selection.shape, dtype=first.old.dtype) for _ in range(2))
    second.selection.put_(old, second.old)
    first.selection.put_(old, first.old)
    first.selection.put_(new, first.new)
    second.selection.put_(new, second.new)
    chosen = Selection.covering(~same_bits(old, new), old.element_size()) & (
        first.selection | second.selection
    )
    return Change(chosen, chosen.take(old), chosen.take(new))


def cast_edit(name: str, old: Tensor, edited: Tensor) -> tuple[Tensor, Bool[Tensor, "..."] | None, Rounding]:
    """Bring an edited tensor into the dtype of the old one.

    Entries that the edit left alone keep the old bits; the others are cast.

    Returns:
        The new tensor, where the edit changed it (None for nowhere), and what the cast cost.

    Raises:
        InputError: the shapes differ, or a value overflows the dtype.
    """
    if old.shape != edited.shape:
        raise InputError(f"{name}: is {list(old.shape)} before and {list(edited.shape)} after the edit")
    edited = edited.detach().cpu()
    wanted = ~same_bits(old.to(edited.dtype), edited)
    if not bool(wanted.any()):
        return old, None, Rounding()
    exact, before = edited[wanted], old[wanted]
    cast = exact.to(old.dtype)
    if bool((cast.isinf() & exact.isfinite()).any()):
        dtype = str(old.dtype).removeprefix("torch.")
        raise InputError(
            f"{name}: edited values overflow the checkpoint's {dtype}; edit more gently, or convert the "
            "checkpoint to float32 first"
        )
    new = edited
    if edited.dtype != old.dtype:
        new = old.clone()
        new[wanted] = cast
    wide = exact.double()
    rounding = Rounding(
        n_wanted=int(wanted.sum()),
        n_vanished=int(same_bits(cast, before).sum()),
        norm_wanted=_norm(wide - before.double()),
        norm_lost=_norm(wide - cast.double()),
    )
    return new, wanted, rounding


def _norm(values: Tensor) -> float:
    return float(values[values.isfinite()].norm())
