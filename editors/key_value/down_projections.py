"""The down projections that a mask located, as matrices that send neurons' activations to values.

In `Linear` the weight is [d_model, d_mlp], in GPT-2's `Conv1D` its transpose; here it is always the former.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from editors.deltas import changed
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from locus.selection import Selection, same_bits
from locus.weight_source import refuse_offloaded, stored

EARLY = 0.2
"""Share of the depth where editors start when the mask leaves the choice to them: about where ROME and MEMIT edit
GPT-J (layers 5 and 3 to 8 of 28)."""


@dataclass(frozen=True, eq=False)
class DownProjection:
    """One layer's down projection and the part of it that may change."""

    layer: int
    param: str
    """Name of the weight."""
    transposed: bool
    """Whether the weight is stored as [d_mlp, d_model]."""
    selection: Selection
    """Entries of the weight, as stored, that may change."""

    @property
    def neurons(self) -> Int64[Tensor, " n"]:
        """Neurons whose column has at least one located entry."""
        return self.selection.touched(0 if self.transposed else 1).nonzero().flatten()

    @property
    def allowed(self) -> Bool[Tensor, "d_model neuron"]:
        """Which entries may change."""
        dense = self.selection.dense()
        return dense.mT if self.transposed else dense

    def weight(self, model: Model) -> Float[Tensor, "d_model neuron"]:
        """The matrix as it is in memory, float64, on the CPU."""
        held = model.module.get_parameter(self.param).detach().double().cpu()
        return held.mT if self.transposed else held

    def spread(self, update: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model neuron"]:
        """An update of the located neurons' columns as one of the whole matrix, zero where nothing may change."""
        allowed = self.allowed
        full = torch.zeros(allowed.shape, dtype=update.dtype)
        full[:, self.neurons] = update
        return torch.where(allowed, full, 0.0)

    def stored_as(self, update: Float[Tensor, "d_model neuron"]) -> Float[Tensor, "a b"]:
        """An update in the orientation of the weight."""
        return update.mT if self.transposed else update


def down_projections(model: Model, mask: WeightMask) -> list[DownProjection]:
    """The located down projections, lowest layer first.

    Raises:
        InputError: a mask of another model, one without down projections, or a model that was changed in
            memory since it was loaded.
    """
    mask.check(model)
    found = []
    for layer, parts in enumerate(model.atlas.neurons):
        for part in parts:
            if part.role == "down" and part.param in mask.entries:
                found.append(DownProjection(layer, part.param, part.axis == 0, mask.entries[part.param]))
    if not found:
        raise InputError(
            "the mask holds no down projection (the weights that FFN neurons write with): locate neurons with "
            "--parts down"
        )
    return found


def chosen_layers(
    located: Sequence[DownProjection], n_layers: int, layers: Sequence[int], most: int
) -> list[DownProjection]:
    """The projections of `layers`; or, where none are named, at most `most` of the located ones.

    Those with the most located weights are preferred; among equals, those nearest to a fifth of the depth.

    Raises:
        InputError: a named layer is not in the mask.
    """
    by_layer = {one.layer: one for one in located}
    if layers:
        if absent := [str(layer) for layer in layers if layer % n_layers not in by_layer]:
            known = ", ".join(map(str, by_layer))
            raise InputError(
                f"layer {', '.join(absent)}: the mask holds no down projection there; it has {known}"
            )
        return [by_layer[layer] for layer in sorted({layer % n_layers for layer in layers})]
    ranked = sorted(located, key=lambda one: (-one.selection.n, abs(one.layer - EARLY * (n_layers - 1))))
    return sorted(ranked[:most], key=lambda one: one.layer)


def whole_projections(model: Model, layers: Sequence[int] = ()) -> WeightMask:
    """A mask of the down projections of some layers, negative from the end; of all of them where none is named.

    Raises:
        InputError: there is no such layer.
    """
    n = model.atlas.n_layers
    if absent := [str(layer) for layer in layers if not -n <= layer < n]:
        raise InputError(f"layer {', '.join(absent)}: {model.name} has layers 0 to {n - 1}")
    chosen = {layer % n for layer in layers} or set(range(n))
    names = [
        part.param
        for layer, parts in enumerate(model.atlas.neurons)
        for part in parts
        if part.role == "down" and layer in chosen
    ]
    return WeightMask.of_parameters(
        names, shapes_of(model.module), model.fingerprint, {"down projections of layers": sorted(chosen)}
    )


def layers_of(model: Model, mask: WeightMask) -> WeightMask:
    """The mask widened to the whole down projections of the layers in which it has FFN neurons.

    Raises:
        InputError: it has none.
    """
    mask.check(model)
    layers = mask.neurons_per_layer(model.atlas).nonzero().flatten().tolist()
    if not layers:
        raise InputError("the mask holds no FFN neurons, so there are no layers to widen it to")
    return whole_projections(model, layers)


def refuse_edited(model: Model, names: Iterable[str]) -> None:
    """Refuse to edit parameters that differ from the checkpoint already: called before anything is measured.

    Raises:
        InputError: the model in memory is not its checkpoint (it was edited since it was loaded), or one of
            them is offloaded.
    """
    parameters = {name: model.module.get_parameter(name) for name in names}
    refuse_offloaded(parameters)
    base = stored(model)
    for name, parameter in parameters.items():
        if not bool(same_bits(base.read(name).to(parameter.dtype), parameter.detach().cpu()).all()):
            raise InputError(
                f"{name}: the model in memory is no longer its checkpoint; export the edit made so far and load that"
            )


@contextlib.contextmanager
def borrowed(model: Model, names: Iterable[str]) -> Iterator[None]:
    """Let these parameters be written; on leaving every bit is as before.

    Raises:
        InputError: see `refuse_edited`.
    """
    names = list(names)
    refuse_edited(model, names)
    parameters = {name: model.module.get_parameter(name) for name in names}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])


def add_(model: Model, projection: DownProjection, update: Float[Tensor, "d_model neuron"]) -> None:
    """Add an update to the weight in memory."""
    held = model.module.get_parameter(projection.param)
    new = held.detach().double() + projection.stored_as(update).to(held.device)
    held.data.copy_(new.to(held.dtype))


def delta_of(
    model: Model,
    updates: Mapping[str, tuple[DownProjection, Float[Tensor, "d_model neuron"]]],
    mask: WeightMask,
    provenance: Mapping[str, Any],
) -> WeightDelta:
    """The artefact of updates of down projections, by the name of the weight."""

    def change(name: str, old: Tensor) -> Tensor:
        projection, update = updates[name]
        return old.double() + projection.selection.take(projection.stored_as(update).contiguous())

    selections = {name: projection.selection for name, (projection, _) in updates.items()}
    return changed(model, selections, change, mask, provenance)
