"""WeightMask: which weights of a model may change. Everything outside is not to move by a single bit."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from locus.checkpoint import Checkpoint
from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood, value_of
from locus.files.tensorfile import tensor_bytes
from locus.selection import Selection
from locus.weight_checks import refuse_coded

if TYPE_CHECKING:
    from locus.atlas import Atlas
    from locus.model import Model

Shapes = Mapping[str, Sequence[int]]
"""Parameter name -> shape, of the whole model: `shapes_of(model.module)`."""


class WeightMask:
    """A set of weights of one model: parameter name -> the entries selected in it.

    Masks combine exactly: `a | b`, `a & b`, `a - b`, `a.complement(shapes)`. Empty entries are dropped.

    Args:
        entries: Parameter names as in `named_parameters()`.
        fingerprint: The model's; "" where it is not known.
        provenance: JSON values that say how the mask came about.
    """

    def __init__(
        self,
        entries: Mapping[str, Selection],
        fingerprint: str = "",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        kept = {name: entries[name] for name in sorted(entries) if entries[name].n}
        self.entries: Mapping[str, Selection] = MappingProxyType(kept)
        self.fingerprint = fingerprint
        self.provenance: Mapping[str, Any] = MappingProxyType(dict(provenance or {}))

    @classmethod
    def of_neurons(
        cls,
        atlas: Atlas,
        chosen: Bool[Tensor, "layer neuron"],
        parts: Iterable[str] = ("gate", "up", "down"),
        fingerprint: str = "",
        provenance: Mapping[str, Any] | None = None,
    ) -> WeightMask:
        """The weights of the chosen FFN neurons.

        Args:
            atlas: Names of the model's parts.
            chosen: True for each neuron wanted.
            parts: Which of a neuron's weights: "gate" and "up" (with their biases), "down".
            fingerprint: The model's.
            provenance: How they were chosen.

        Raises:
            ValueError: `chosen` is not `[n_layers, d_mlp]`.
        """
        if tuple(chosen.shape) != (atlas.n_layers, atlas.d_mlp):
            raise ValueError(f"chosen {tuple(chosen.shape)}, neurons are [{atlas.n_layers}, {atlas.d_mlp}]")
        wanted = set(parts)
        entries: dict[str, Selection] = {}
        for layer, row in zip(atlas.neurons, chosen.cpu(), strict=True):
            neurons = row.nonzero().flatten()
            for part in layer:
                if part.role.removesuffix("_bias") not in wanted:
                    continue
                # A fused projection holds several parts behind each other on the same axis.
                length = atlas.d_mlp + max(p.offset for p in layer if p.param == part.param)
                shape = (length,) if part.role.endswith("_bias") else (length, atlas.d_model)
                shape = shape[::-1] if part.axis == 1 else shape
                new = Selection("columns" if part.axis == 1 else "rows", neurons + part.offset, shape)
                entries[part.param] = entries[part.param] | new if part.param in entries else new
        return cls(entries, fingerprint, provenance)

    @classmethod
    def of_parameters(
        cls,
        names: Iterable[str],
        shapes: Shapes,
        fingerprint: str = "",
        provenance: Mapping[str, Any] | None = None,
    ) -> WeightMask:
        """Whole parameters, by name or by shell pattern (`"*.mlp.*"`).

        Raises:
            InputError: a name or pattern that matches no parameter.
        """
        entries: dict[str, Selection] = {}
        for name in names:
            found = [name] if name in shapes else fnmatch.filter(shapes, name)
            if not found:
                close = difflib.get_close_matches(name, shapes, n=1, cutoff=0.3)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise InputError(f"parameter {name}: the model has none of this name or pattern{hint}")
            entries |= {match: Selection("all", None, tuple(shapes[match])) for match in found}
        return cls(entries, fingerprint, provenance)

    @classmethod
    def of_elements(
        cls,
        chosen: Mapping[str, Bool[Tensor, "..."]],
        fingerprint: str = "",
        provenance: Mapping[str, Any] | None = None,
    ) -> WeightMask:
        """Single weights: for each parameter, True where a weight is wanted."""
        return cls({name: Selection.of(where) for name, where in chosen.items()}, fingerprint, provenance)

    @property
    def n_weights(self) -> int:
        """Weights selected."""
        return sum(selection.n for selection in self.entries.values())

    @property
    def digest(self) -> str:
        """sha256 hex of the weights selected: equal for equal masks, whatever their provenance."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for name, selection in self.entries.items():
            form, data = selection.stored()
            digest.update(f"\n{name} {form} {list(selection.shape)}\n".encode())
            if data is not None:
                digest.update(tensor_bytes(data))
        return digest.hexdigest()

    def fraction(self, shapes: Shapes) -> float:
        """Share of the model's weights that is selected."""
        return self.n_weights / max(1, sum(torch.Size(shape).numel() for shape in shapes.values()))

    def neurons_per_layer(self, atlas: Atlas) -> Int64[Tensor, " layer"]:
        """How many FFN neurons of each layer have at least one weight in the mask."""
        counts = torch.zeros(atlas.n_layers, dtype=torch.int64)
        for layer, parts in enumerate(atlas.neurons):
            touched = torch.zeros(atlas.d_mlp, dtype=torch.bool)
            for part in parts:
                if part.param in self.entries:
                    along = self.entries[part.param].touched(part.axis)
                    touched |= along[part.offset : part.offset + atlas.d_mlp]
            counts[layer] = touched.sum()
        return counts

    def __or__(self, other: WeightMask) -> WeightMask:
        return self._combined(other, "union", Selection.__or__, {*self.entries, *other.entries})

    def __and__(self, other: WeightMask) -> WeightMask:
        return self._combined(
            other, "intersection", Selection.__and__, set(self.entries) & set(other.entries)
        )

    def __sub__(self, other: WeightMask) -> WeightMask:
        return self._combined(other, "difference", Selection.__sub__, set(self.entries))

    def complement(self, shapes: Shapes) -> WeightMask:
        """Every weight of the model that is not in the mask.

        Raises:
            InputError: the mask has a parameter that `shapes` has not, or of another shape.
        """
        _agree(self.entries, shapes, "the model")
        rest = {
            name: ~self.entries[name] if name in self.entries else Selection("all", None, tuple(shape))
            for name, shape in shapes.items()
        }
        return WeightMask(rest, self.fingerprint, {"op": "complement", "of": [dict(self.provenance)]})

    def __eq__(self, other: object) -> bool:
        """Same weights of the same model; provenance does not matter."""
        if not isinstance(other, WeightMask):
            return NotImplemented
        return self.fingerprint == other.fingerprint and dict(self.entries) == dict(other.entries)

    def __hash__(self) -> int:
        return hash((self.fingerprint, tuple(self.entries)))

    def __repr__(self) -> str:
        return f"WeightMask({self.n_weights} weights in {len(self.entries)} parameters)"

    def check(self, model: Model, *, strict: bool = True) -> None:
        """Refuse a mask that was made for another model, or whose parameters cannot be edited.

        Args:
            model: The model it is about to be used on.
            strict: Compare fingerprints too; False accepts another model of the same names and shapes.

        Raises:
            InputError: says the first thing that differs, or the first parameter that is stored as codes (float8,
                int8), which no edit can be written in.
        """
        _agree(self.entries, shapes_of(model.module), model.name)
        if model.folder is not None and model.device.type != "meta":  # of a shape there need be no weights
            refuse_coded(Checkpoint(model.folder), self.entries, model.name)
        if strict and self.fingerprint and self.fingerprint != model.fingerprint:
            raise InputError(
                f"mask: made for a model with fingerprint {self.fingerprint[:12]}, {model.name} has "
                f"{model.fingerprint[:12]}: same names and shapes, other weights; locate again on this model"
            )

    def save(self, path: str | Path) -> None:
        """Write kind "mask": an index or one bit a weight for each parameter, whichever is smaller.

        Raises:
            InputError: `path` cannot be written.
        """
        entries: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, selection in self.entries.items():
            form, data = selection.stored()
            entries[name] = {"form": form, "shape": list(selection.shape)}
            if data is not None:
                tensors[name] = data
        meta = {"entries": entries, "fingerprint": self.fingerprint, "provenance": dict(self.provenance)}
        save_tensors(path, "mask", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> WeightMask:
        """Read what `save` wrote.

        Raises:
            InputError: missing, damaged, or not a mask.
        """
        tensors, meta = load_tensors(path, "mask")
        with understood(path, "mask", "locate again"):
            entries = {
                name: Selection.restored(entry["form"], tensors.get(name), tuple(entry["shape"]))
                for name, entry in meta["entries"].items()
            }
            fingerprint = value_of(str, meta["fingerprint"], "fingerprint")
            return cls(entries, fingerprint, value_of(Mapping[str, Any], meta["provenance"], "provenance"))

    def _combined(
        self,
        other: WeightMask,
        op: str,
        combine: Callable[[Selection, Selection], Selection],
        names: set[str],
    ) -> WeightMask:
        mine, theirs = self.fingerprint, other.fingerprint
        if mine and theirs and mine != theirs:
            raise InputError(f"masks of two models ({mine[:12]} and {theirs[:12]}) do not combine")
        entries: dict[str, Selection] = {}
        for name in names:
            a, b = self.entries.get(name), other.entries.get(name)
            if a is not None and b is not None and a.shape != b.shape:
                raise InputError(
                    f"masks of two models: {name} is {list(a.shape)} in one, {list(b.shape)} in the other"
                )
            both = combine(a, b) if a is not None and b is not None else a or b
            if both is not None:
                entries[name] = both
        provenance = {"op": op, "of": [dict(self.provenance), dict(other.provenance)]}
        return WeightMask(entries, mine or theirs, provenance)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _agree(entries: Mapping[str, Selection], shapes: Shapes, where: str) -> None:
    for name, selection in entries.items():
        if name not in shapes:
            raise InputError(
                f"mask: made for another model: {where} has no parameter {name}; locate again on it"
            )
        if tuple(shapes[name]) != selection.shape:
            raise InputError(
                f"mask: made for another model: {name} is {list(selection.shape)} in the mask and "
                f"{list(shapes[name])} in {where}; locate again on it"
            )
