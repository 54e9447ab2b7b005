"""Which weights of which located FFN neurons an edit concerns: values, keys or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from editors.key_value.down_projections import DownProjection, down_projections, refuse_edited
from locus.errors import InputError
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection

Part = Literal["values", "keys", "both", "gate", "up"]
"""values: value vectors, what neurons write (columns of the down projection); keys: key vectors, what they
respond to (rows of gate and up, biases too)."""
ROLES = {
    "values": ("down",),
    "keys": ("gate", "up"),
    "both": ("gate", "up", "down"),
    "gate": ("gate",),
    "up": ("up",),
}


def listed(model: Model, neurons: Sequence[str]) -> Bool[Tensor, "layer neuron"]:
    """Neurons named one by one: "3:117" is neuron 117 of layer 3.

    Raises:
        InputError: a name of another form, or of a neuron that the model has not.
    """
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    for name in neurons:
        layer, colon, neuron = name.partition(":")
        if not (colon and layer.isdecimal() and neuron.isdecimal()):
            raise InputError(f'neuron "{name}": write layer:neuron, as 3:117')
        if int(layer) >= model.atlas.n_layers or int(neuron) >= model.atlas.d_mlp:
            raise InputError(
                f"neuron {name}: {model.name} has layers 0 to {model.atlas.n_layers - 1} of {model.atlas.d_mlp} neurons"
            )
        chosen[int(layer), int(neuron)] = True
    return chosen


def neuron_mask(model: Model, neurons: Sequence[str], part: Part = "both") -> WeightMask:
    """A mask of neurons named one by one.

    Raises:
        InputError: none is named, or see `listed`.
    """
    if not neurons:
        raise InputError("no neurons: give --mask, or --neurons as layer:neuron")
    return WeightMask.of_neurons(
        model.atlas, listed(model, neurons), ROLES[part], model.fingerprint, {"neurons": list(neurons)}
    )


def located_parts(
    model: Model, mask: WeightMask, part: Part, neurons: Sequence[str] = ()
) -> dict[str, Selection]:
    """The entries of the mask that are such weights of neurons, of the listed ones only if any are listed.

    Raises:
        InputError: a mask of another model, one without such weights, or listed neurons that are not in it.
    """
    mask.check(model)
    every = torch.ones(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    wanted = listed(model, neurons) if neurons else every
    of_part = WeightMask.of_neurons(model.atlas, wanted, ROLES[part], mask.fingerprint)
    found = mask & of_part
    if neurons and found != of_part:
        raise InputError(f"the mask does not hold all {part} of the {len(neurons)} neurons listed")
    if not found.entries:
        raise InputError(f"the mask holds no {part} of FFN neurons: locate with other --parts")
    return dict(found.entries)


def located_values(model: Model, mask: WeightMask, neurons: Sequence[str] = ()) -> list[DownProjection]:
    """The located neurons' values, layer by layer.

    Raises:
        InputError: see `located_parts`; or the model in memory is not its checkpoint there.
    """
    selections = located_parts(model, mask, "values", neurons)
    refuse_edited(model, selections)
    return [
        DownProjection(one.layer, one.param, one.transposed, selections[one.param])
        for one in down_projections(model, mask)
        if one.param in selections
    ]
