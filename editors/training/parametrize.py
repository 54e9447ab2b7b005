"""Located weights as small trainable deltas beside a frozen base: nothing else can move.

For a matrix that is applied to an input (Linear, Conv1D, Embedding) the delta's own contribution is added to
the module's output, so the gradient of the whole matrix is never formed:

    rows i of a Linear       y[..., i] += x D^T          D [k, in]
    columns j of a Linear    y += x[..., j] D^T          D [out, k]

Everything else (vectors, single elements, embeddings that scale) runs with the located entries of its parameter
replaced for the duration of the module's forward. Every module that holds a shared (tied) parameter gets the
delta. Deltas are float32 when the base is half precision; the forward sees them whole, or, on request, what rounding
to the checkpoint's dtype leaves of them.

Where the base is sharded over processes (`locus.parallel.sharding`) the deltas are too: each is unsharded where it
is used, and what is replaced is the parameter as it stands while its block runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editors.training.rounding import as_saved
from locus.errors import InputError
from locus.hooks import replaced_forward
from locus.mask import WeightMask
from locus.parallel.sharding import device_of, full_tensor, gather, zeros_beside
from locus.selection import Selection


@dataclass(frozen=True, eq=False)
class _Place:
    """One use of a located parameter: the module that holds it, and under which name."""

    module: nn.Module
    """The module that holds the parameter."""
    attribute: str
    """The parameter's name in it."""
    kind: str
    """Kind of the selection: "all", "rows", "columns" or "elements"."""
    index: Tensor | None
    """Index of the selection, on the device that computes; None for the whole parameter."""
    value: nn.Parameter
    """The delta, compact."""
    n_rows: int
    """Rows of the parameter."""
    saved: torch.dtype | None = None
    """dtype to which the forward rounds base plus delta; None for no rounding."""

    def effective(self, base: Tensor) -> Tensor:
        """The whole parameter with the delta added, in the base's dtype: what would be exported."""
        entries = self._new(self._old(base)).to(base.dtype)
        if self.index is None:
            return entries
        flat = base.reshape(-1) if self.kind == "elements" else base
        return flat.index_copy(self._axis, self.index, entries).view_as(base)

    def change(self) -> Tensor:
        """The delta as the forward sees it: whole, or what rounding the weight leaves of it."""
        if self.saved is None:
            return gather(self.value)
        base = self.module._parameters[self.attribute]
        assert base is not None
        old = self._old(base)
        return self._new(old) - old

    def _old(self, base: Tensor) -> Tensor:
        """The located entries of the base, in the delta's dtype."""
        flat = base.reshape(-1) if self.kind == "elements" else base
        old = flat if self.index is None else flat.index_select(self._axis, self.index)
        return old.to(self.value.dtype)

    def _new(self, old: Tensor) -> Tensor:
        value = gather(self.value)
        return old + value if self.saved is None else as_saved(old, value, self.saved)

    @property
    def _axis(self) -> int:
        return 1 if self.kind == "columns" else 0


@runtime_checkable
class Trained(Protocol):
    """Deltas of any form, as the training loop uses them."""

    values: dict[str, nn.Parameter]
    """The trainable tensors, by name."""
    selections: dict[str, Selection]
    """The entries of each parameter that can move."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors."""

    @property
    def n_weights(self) -> int:
        """Number of weights that can move."""

    def attached(self) -> contextlib.AbstractContextManager[Any]:
        """Run the module with the deltas inside the block."""

    def silenced(self) -> contextlib.AbstractContextManager[None]:
        """Run it as the reference model inside the block."""

    def dense(self, name: str) -> Tensor:
        """The change of one parameter's selected entries."""

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainable tensors in place."""


class Deltas:
    """Trainable deltas for the entries of a mask, and the switch that turns them on and off."""

    def __init__(
        self, module: nn.Module, mask: WeightMask, saved: Mapping[str, torch.dtype] | None = None
    ) -> None:
        """Zero deltas for every entry of `mask`; the module itself is not touched before `attached`.

        Args:
            module: The base.
            mask: The entries that get a delta.
            saved: Parameter name -> dtype that it will be saved in: the forward then runs with the weights rounded
                to it. None runs with the deltas as they are.

        Raises:
            InputError: the mask names a parameter the module does not have, of another shape, of an integer
                or packed dtype, not in memory, or twice under two tied names.
        """
        named = dict(module.named_parameters(remove_duplicate=False))
        self.values: dict[str, nn.Parameter] = {}
        self.selections: dict[str, Selection] = dict(mask.entries)
        self.bases: dict[str, nn.Parameter] = {}
        self._enabled = True
        owner: dict[int, str] = {}
        for name, selection in mask.entries.items():
            base = _checked(named, name, selection)
            if id(base) in owner:
                raise InputError(
                    f"the mask names one tied tensor twice, as {owner[id(base)]} and {name}: keep one"
                )
            owner[id(base)] = name
            dtype = torch.promote_types(base.dtype, torch.float32)
            self.bases[name] = base
            self.values[name] = nn.Parameter(zeros_beside(base, selection.compact_shape, dtype))
        self._places: list[_Place] = []
        for holder in module.modules():
            for attribute, held in holder._parameters.items():
                if held is not None and id(held) in owner:
                    name = owner[id(held)]
                    kind, index = self.selections[name].kind, self.selections[name].index
                    index = None if index is None else index.to(device_of(held))
                    n_rows = held.shape[0] if held.dim() else 1
                    rounded = None if saved is None else saved[name]
                    self._places.append(
                        _Place(holder, attribute, kind, index, self.values[name], n_rows, rounded)
                    )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, in the mask's order."""
        return list(self.values.values())

    @property
    def n_weights(self) -> int:
        """Number of weights that can move."""
        return sum(value.numel() for value in self.values.values())

    @contextlib.contextmanager
    def attached(self) -> Iterator[Deltas]:
        """Run the module with the deltas inside the block; its forwards are its own again afterwards."""
        by_module: dict[nn.Module, list[_Place]] = {}
        for place in self._places:
            by_module.setdefault(place.module, []).append(place)
        with contextlib.ExitStack() as stack:
            for holder, places in by_module.items():
                stack.enter_context(_forward_with(holder, places, lambda: self._enabled))
            yield self

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Inside the block the module is the reference model again: the same frozen weights, no second copy."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def dense(self, name: str) -> Tensor:
        """The change of one parameter's selected entries, compact, in full precision."""
        return full_tensor(self.values[name].detach())

    def new_entries(self) -> dict[str, Tensor]:
        """Base plus delta for every masked entry, compact, rounded to the base's dtype."""
        return {
            name: (
                self.selections[name].take(full_tensor(base)).to(self.values[name].dtype) + self.dense(name)
            ).to(base.dtype)
            for name, base in self.bases.items()
        }

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the deltas, in place, to `values` (same names and shapes)."""
        for name, value in self.values.items():
            value.copy_(values[name])


def _checked(named: Mapping[str, nn.Parameter], name: str, selection: Selection) -> nn.Parameter:
    """The parameter `name`, when the selection fits it."""
    if name not in named:
        raise InputError(
            f"mask entry {name}: the model has no such parameter; was the mask made for another model?"
        )
    base = named[name]
    if tuple(base.shape) != tuple(selection.shape):
        raise InputError(
            f"mask entry {name}: made for shape {tuple(selection.shape)}, the model has {tuple(base.shape)}"
        )
    if base.is_meta:
        raise InputError(
            f"mask entry {name}: not in memory (offloaded); load the model without offloading to edit it"
        )
    if not base.is_floating_point():
        raise InputError(
            f"mask entry {name}: dtype {base.dtype} cannot be trained; load the model unquantized"
        )
    return base


@contextlib.contextmanager
def _forward_with(holder: nn.Module, places: list[_Place], enabled: Callable[[], bool]) -> Iterator[None]:
    """Give one module a forward that knows its deltas, for the duration of the block."""
    adders = {place: _adder(place) for place in places}
    added = [adder for adder in adders.values() if adder is not None]
    swapped = [place for place, adder in adders.items() if adder is None]
    with replaced_forward(holder, partial(_forward, holder.forward, swapped, added, enabled)):
        yield


def _forward(
    plain: Callable[..., Any],
    swapped: list[_Place],
    added: list[_Adder],
    enabled: Callable[[], bool],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not enabled():
        return plain(*args, **kwargs)
    with _replaced(swapped):
        output = plain(*args, **kwargs)
    for add in added:
        output = add(args[0] if args else next(iter(kwargs.values())), output)
    return output


@contextlib.contextmanager
def _replaced(places: list[_Place]) -> Iterator[None]:
    """Let the holders' parameters be base plus delta inside the block; the dictionaries keep their order."""
    held = [place.module._parameters[place.attribute] for place in places]
    try:
        for place, base in zip(places, held, strict=True):
            assert base is not None
            place.module._parameters[place.attribute] = place.effective(base)  # type: ignore[assignment]
        yield
    finally:
        for place, base in zip(places, held, strict=True):
            place.module._parameters[place.attribute] = base


_Adder = Callable[[Tensor, Tensor], Tensor]
"""Module's input and output -> its output with the delta's contribution."""


def _adder(place: _Place) -> _Adder | None:
    """How the delta's contribution is added to its module's output, or None where only replacing is exact."""
    from transformers.pytorch_utils import Conv1D

    if place.attribute != "weight" or place.kind == "elements":
        return None
    if isinstance(place.module, nn.Linear):
        return partial(_add_linear, place, 0)
    if isinstance(place.module, Conv1D):
        return partial(_add_linear, place, 1)
    if type(place.module) is nn.Embedding and place.module.max_norm is None:
        return _embedding_adder(place)
    return None


def _add_linear(place: _Place, out_axis: int, x: Tensor, y: Tensor) -> Tensor:
    """To y = x W^T (`out_axis` 0, Linear) or y = x W (`out_axis` 1, Conv1D).

    In place: y is the module's own fresh output, which no backward needs.
    """
    change = place.change().to(x.dtype)
    matrix = change if out_axis == 0 else change.T
    if place.index is None:
        return y.add_(F.linear(x, matrix))
    if place.kind == ("rows" if out_axis == 0 else "columns"):
        return y.index_add_(-1, place.index, F.linear(x, matrix).to(y.dtype))
    return y.add_(F.linear(x.index_select(-1, place.index), matrix))


def _embedding_adder(place: _Place) -> _Adder:
    """For y = W[ids]: unselected ids look up a row of zeros."""
    kind, index = place.kind, place.index
    if kind == "rows" and index is not None:
        slot = torch.full((place.n_rows,), len(index), device=index.device)
        slot[index] = torch.arange(len(index), device=index.device)

    def add(ids: Tensor, y: Tensor) -> Tensor:
        rows = place.change()
        if kind == "all" or index is None:
            return y + F.embedding(ids, rows).to(y.dtype)
        if kind == "rows":
            padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            return y + F.embedding(slot[ids], padded).to(y.dtype)
        return y.index_add(-1, index, F.embedding(ids, rows).to(y.dtype))

    return add
