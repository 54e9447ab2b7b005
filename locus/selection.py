"""Which entries of one tensor: all of it, some rows, some columns, or single elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor

SelectionKind = Literal["all", "rows", "columns", "elements"]
_BITS_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Selection:
    """A set of entries of a tensor of a given shape, kept in its smallest form.

    The form is canonical: a set that fills the tensor is "all", one made of whole rows is "rows", of whole
    columns "columns", anything else (the empty set too) "elements". Equal sets are therefore equal objects.
    Large element sets are kept at one bit an entry, small ones at four bytes an element.

    Args:
        kind: "rows" are indices on dimension 0, "columns" on dimension 1, "elements" on the flattened tensor.
        index: Integers, any order, repeats allowed; None for "all".
        shape: The tensor's.

    Raises:
        ValueError: an index outside the shape, an unknown kind, or a shape without such a dimension.
    """

    __slots__ = ("_bits", "_index", "kind", "shape")

    kind: SelectionKind
    shape: tuple[int, ...]

    def __init__(self, kind: SelectionKind, index: Tensor | None, shape: tuple[int, ...]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self._bits: NDArray[np.uint8] | None = None
        if kind == "all" and index is None:
            self._become("all", np.empty(0, np.int64))
            return
        limits = {"rows": self.shape[:1], "columns": self.shape[1:2], "elements": (self.numel,)}
        if kind not in limits or index is None or not limits[kind]:
            raise ValueError(
                f"no selection of kind {kind!r} with index {index} in a tensor of shape {self.shape}"
            )
        values = np.unique(index.detach().cpu().numpy().reshape(-1))
        if len(values) and (values[0] < 0 or values[-1] >= limits[kind][0]):
            raise ValueError(f"{kind} {values[0]} to {values[-1]} of a tensor of shape {self.shape}")
        self._become(kind, values)

    @classmethod
    def of(cls, chosen: Bool[Tensor, "..."]) -> Selection:
        """The entries where `chosen`, of the tensor's own shape, is True."""
        return cls._of_array(chosen.detach().cpu().numpy())

    @classmethod
    def covering(cls, changed: Bool[Tensor, "..."], itemsize: int) -> Selection:
        """The set that holds every True entry and costs least to store with two values of `itemsize` bytes each.

        Exactly the True entries, or the rows, columns or the whole tensor around them: an index of elements
        costs more than a few unchanged neighbours.
        """
        exact = cls.of(changed)
        form, data = exact.stored()
        costs = [(2 * itemsize * exact.n + (data.nbytes if data is not None else 0), exact)]
        for axis, kind in enumerate(
            ("rows", "columns")[: changed.ndim] if form in ("elements", "bits") else ()
        ):
            around = cls(kind, exact.touched(axis).nonzero(), exact.shape)  # type: ignore[arg-type]
            costs.append((2 * itemsize * around.n + around._index.nbytes, around))
        return min(costs, key=lambda cost: cost[0])[1]

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Shape of what `take` gives."""
        if self.kind == "rows":
            return (len(self._index), *self.shape[1:])
        if self.kind == "columns":
            return (self.shape[0], len(self._index), *self.shape[2:])
        return self.shape if self.kind == "all" else (self.n,)

    @property
    def numel(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def n(self) -> int:
        """Entries selected."""
        if self.kind == "all":
            return self.numel
        if self._bits is not None:
            return int(np.bitwise_count(self._bits).sum())
        others = {"rows": self.numel // max(1, self.shape[0]) if self.shape else 1}
        if self.kind == "columns":
            others["columns"] = self.numel // self.shape[1]
        return len(self._index) * others.get(self.kind, 1)

    @property
    def index(self) -> Int64[Tensor, " n"] | None:
        """Rows, columns or flat elements, ascending; None for "all"."""
        if self.kind == "all":
            return None
        if self._bits is not None:
            return torch.from_numpy(np.flatnonzero(self._array().reshape(-1)))
        return torch.from_numpy(self._index.astype(np.int64))

    def dense(self) -> Bool[Tensor, "..."]:
        """The set as a mask of the tensor's shape."""
        return torch.from_numpy(self._array())

    def contains(self, flat: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of these flat positions are in the set."""
        return torch.from_numpy(self._has(flat.numpy()))

    def touched(self, axis: int) -> Bool[Tensor, " n"]:
        """Which indices of dimension `axis` have at least one entry in the set."""
        own = {"rows": 0, "columns": 1}.get(self.kind)
        if self.kind == "all" or (own is not None and own != axis):
            return torch.full((self.shape[axis],), self.n > 0)
        out = torch.zeros(self.shape[axis], dtype=torch.bool)
        if own is not None:
            out[torch.from_numpy(self._index.astype(np.int64))] = True
        elif self._bits is not None:
            out |= (
                self.dense().transpose(0, axis).flatten(1).any(dim=1) if len(self.shape) > 1 else self.dense()
            )
        else:
            out[torch.from_numpy(np.unravel_index(self._index, self.shape)[axis])] = True
        return out

    def window(self, start: int, stop: int) -> Selection:
        """The part of the set in rows `start` to `stop`, as a set of a tensor of those rows alone.

        Values that `take` gave, flattened, fall apart into those of consecutive windows in order.
        """
        shape = (stop - start, *self.shape[1:])
        if self.kind in ("all", "columns"):
            return self._with(self._index, shape)
        if self.kind == "rows":
            low, high = np.searchsorted(self._index, (start, stop))
            return self._with(self._index[low:high] - start, shape)
        a_row = math.prod(self.shape[1:])
        first, last = start * a_row, stop * a_row
        if self._bits is None:
            low, high = np.searchsorted(self._index, (first, last))
            return self._with(self._index[low:high] - first, shape)
        bits = np.unpackbits(self._bits[first >> 3 : -(-last >> 3)])[first & 7 :][: last - first]
        return self._of_array(bits.view(np.bool_).reshape(shape))

    def take(self, tensor: Tensor) -> Tensor:
        """The selected entries, bit for bit: rows `[n, …]`, columns `[:, n, …]`, else `[n]` or all."""
        self._same_shape(tensor)
        bits = tensor.detach().view(_BITS_OF[tensor.element_size()])
        if self.kind == "all":
            out = bits.clone(memory_format=torch.contiguous_format)
        elif self.kind in ("rows", "columns"):
            out = bits.index_select(int(self.kind == "columns"), self._on(tensor))
        elif self._bits is not None:
            out = bits[self.dense().to(tensor.device)]
        else:
            out = bits.reshape(-1)[self._on(tensor)]
        return out.contiguous().view(tensor.dtype)

    def put_(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the selected entries of `tensor` with what `take` would give, bit for bit."""
        self._same_shape(tensor)
        if values.dtype != tensor.dtype:
            raise ValueError(f"values of {values.dtype} for a tensor of {tensor.dtype}")
        kind = _BITS_OF[tensor.element_size()]
        bits, new = tensor.detach().view(kind), values.detach().to(tensor.device).view(kind)
        if self.kind == "all":
            bits.copy_(new)
        elif self.kind in ("rows", "columns"):
            bits.index_copy_(int(self.kind == "columns"), self._on(tensor), new)
        elif self._bits is not None:
            bits[self.dense().to(tensor.device)] = new
        elif bits.is_contiguous():
            bits.view(-1)[self._on(tensor)] = new
        else:
            bits[torch.unravel_index(self._on(tensor), self.shape)] = new

    def __or__(self, other: Selection) -> Selection:
        self._same_shape(other)
        if self.kind == "all" or other.n == 0:
            return self
        if other.kind == "all" or self.n == 0:
            return other
        if self._alike(other):
            return self._with(np.union1d(self._index, other._index))
        return self._of_array(self._array() | other._array())

    def __and__(self, other: Selection) -> Selection:
        if other.kind == "elements" and other._bits is None:
            self, other = other, self
        return self._kept(other, np.intersect1d, lambda inside: inside)

    def __sub__(self, other: Selection) -> Selection:
        return self._kept(other, np.setdiff1d, lambda inside: ~inside)

    def __invert__(self) -> Selection:
        return Selection("all", None, self.shape) - self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection) or (self.kind, self.shape) != (other.kind, other.shape):
            return False
        if self._bits is None or other._bits is None:
            return (self._bits is other._bits) and np.array_equal(self._index, other._index)
        return np.array_equal(self._bits, other._bits)

    def __hash__(self) -> int:
        return hash((self.kind, self.shape, self.n))

    def __repr__(self) -> str:
        return f"Selection({self.kind}, {self.n} of {self.numel} in {list(self.shape)})"

    def stored(self) -> tuple[str, Tensor | None]:
        """How to save it: ("all", None), (its kind, index) or ("bits", packed bytes)."""
        if self.kind == "all":
            return "all", None
        if self._bits is not None:
            return "bits", torch.from_numpy(self._bits)
        return self.kind, torch.from_numpy(self._index)

    @classmethod
    def restored(cls, form: object, data: Tensor | None, shape: Sequence[object]) -> Selection:
        """The inverse of `stored`. Raises ValueError for what `stored` cannot have given."""
        sizes = tuple(n for n in shape if type(n) is int and 0 <= n < 1 << 62)
        if len(sizes) != len(shape) or (data is not None and data.is_floating_point()):
            raise ValueError(f"no selection in shape {shape}")
        if form in get_args(SelectionKind):
            return cls(form, data, sizes)  # type: ignore[arg-type]
        if form != "bits" or data is None or data.dtype != torch.uint8:
            raise ValueError(f"no form {form!r} of a selection")
        if data.numel() != -(-math.prod(sizes) // 8):
            raise ValueError(f"not one bit an entry of shape {shape}")
        return cls._of_array(
            np.unpackbits(data.numpy(), count=math.prod(sizes)).view(np.bool_).reshape(sizes)
        )

    # ---- how it is kept

    def _become(self, kind: SelectionKind, values: NDArray[Any]) -> None:
        """Take sorted unique `values` of `kind`, in canonical form."""
        rows = self.shape[0] if self.shape else 1
        columns = self.shape[1] if len(self.shape) > 1 else 1
        if kind == "elements" and self.shape and len(values):
            a_row = self.numel // rows
            owners = np.unique(values // a_row)
            if len(owners) * a_row == len(values):
                kind, values = "rows", owners
            elif len(self.shape) > 1:
                owners = np.unique(values // (a_row // columns) % columns)
                if len(owners) * (self.numel // columns) == len(values):
                    kind, values = "columns", owners
        full = {"all": True, "rows": len(values) == rows, "columns": len(values) == columns}
        if full.get(kind, len(values) == self.numel) and self.numel:
            kind, values = "all", values[:0]
        elif kind != "all" and (not len(values) or not self.numel):
            kind, values = "elements", values[:0]
        self.kind = kind
        self._index: NDArray[Any] = values.astype(np.int32 if self.numel < 1 << 31 else np.int64)
        if kind == "elements" and 8 * self._index.nbytes > self.numel:
            packed = np.zeros(self.numel, np.bool_)
            packed[self._index] = True
            self._bits, self._index = np.packbits(packed), self._index[:0]

    @classmethod
    def _of_array(cls, chosen: NDArray[np.bool_]) -> Selection:
        """As `of`, without listing the elements of a large set."""
        new = cls.__new__(cls)
        new.shape, new._bits = chosen.shape, None
        n = int(np.count_nonzero(chosen))
        width = 4 if new.numel < 1 << 31 else 8
        if 8 * width * n <= new.numel:
            new._become("elements", np.flatnonzero(chosen))
            return new
        for axis, kind in enumerate(("rows", "columns")[: chosen.ndim]):
            rest = tuple(i for i in range(chosen.ndim) if i != axis)
            whole = chosen.all(axis=rest)
            if int(whole.sum()) * (new.numel // chosen.shape[axis]) == n:
                new._become(kind, np.flatnonzero(whole))  # type: ignore[arg-type]
                return new
        if n == new.numel:
            new._become("all", np.empty(0, np.int64))
            return new
        new.kind, new._index = "elements", np.empty(0, np.int32 if width == 4 else np.int64)
        new._bits = np.packbits(chosen.reshape(-1))
        return new

    def _array(self) -> NDArray[np.bool_]:
        if self._bits is not None:
            return np.unpackbits(self._bits, count=self.numel).view(np.bool_).reshape(self.shape)
        out = np.full(self.shape, self.kind == "all", dtype=np.bool_)
        if self.kind == "rows":
            out[self._index] = True
        elif self.kind == "columns":
            out[:, self._index] = True
        elif self.kind == "elements":
            out.reshape(-1)[self._index] = True
        return out

    def _has(self, flat: NDArray[Any]) -> NDArray[np.bool_]:
        if self.kind == "all":
            return np.ones(len(flat), np.bool_)
        if self._bits is not None:
            bits: NDArray[np.uint8] = self._bits[flat >> 3] >> (7 - (flat & 7)).astype(np.uint8) & 1
            return bits.view(np.bool_)
        if self.kind == "elements":
            at = np.searchsorted(self._index, flat)
            inside: NDArray[np.bool_] = at < len(self._index)
            inside[inside] = self._index[at[inside]] == flat[inside]
            return inside
        axis = int(self.kind == "columns")
        table = np.zeros(self.shape[axis], np.bool_)
        table[self._index] = True
        inside = table[flat // math.prod(self.shape[axis + 1 :]) % self.shape[axis]]
        return inside

    def _kept(
        self,
        other: Selection,
        combine: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]],
        keep: Callable[[NDArray[np.bool_]], NDArray[np.bool_]],
    ) -> Selection:
        """The part of this set that is, or is not, in the other."""
        self._same_shape(other)
        if self._alike(other):
            return self._with(combine(self._index, other._index))
        if self.kind == "elements" and self._bits is None:
            return self._with(self._index[keep(other._has(self._index.astype(np.int64)))])
        if self.kind == "all" and other.kind in ("rows", "columns"):
            every = np.arange(self.shape[other.kind == "columns"])
            inside = np.isin(every, other._index, assume_unique=True)
            return other._with(every[keep(inside)])
        if other.kind == "all" or self.n == 0 or other.n == 0:
            return self if keep(np.array([other.n > 0]))[0] or self.n == 0 else self._empty()
        return self._of_array(self._array() & keep(other._array()))

    def _alike(self, other: Selection) -> bool:
        return self.kind == other.kind != "all" and self._bits is None and other._bits is None

    def _with(self, values: NDArray[Any], shape: tuple[int, ...] | None = None) -> Selection:
        new = Selection.__new__(Selection)
        new.shape, new._bits = self.shape if shape is None else shape, None
        new._become(self.kind, values)
        return new

    def _empty(self) -> Selection:
        return Selection("elements", torch.empty(0, dtype=torch.int64), self.shape)

    def _on(self, tensor: Tensor) -> Tensor:
        return torch.from_numpy(self._index.astype(np.int64)).to(tensor.device)

    def _same_shape(self, other: Tensor | Selection) -> None:
        if tuple(other.shape) != self.shape:
            raise ValueError(f"a selection in shape {self.shape} used on shape {tuple(other.shape)}")


def same_bits(a: Tensor, b: Tensor) -> Bool[Tensor, "..."]:
    """Where two tensors of one dtype and shape hold the same bits: NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"{a.dtype} {tuple(a.shape)} compared with {b.dtype} {tuple(b.shape)}")
    kind = _BITS_OF[a.element_size()]
    return a.detach().view(kind) == b.detach().view(kind)
