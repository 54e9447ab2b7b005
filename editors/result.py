"""From trained deltas to the artefact, in the checkpoint's own dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from editors.parametrize import Trained
from editors.rounding import stochastically_rounded
from editors.training import Training, generator
from locus.delta import WeightDelta
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from locus.weights import stored


def settings_of(editor: Any) -> dict[str, Any]:
    """An editor's name and hyperparameters, as JSON values."""
    return {"name": type(editor).__name__, **asdict(editor)}


def changed(
    model: Model,
    selections: Mapping[str, Selection],
    change: Callable[[str, Tensor], Tensor],
    mask: WeightMask,
    provenance: Mapping[str, Any],
) -> WeightDelta:
    """The delta that gives the selected entries of the model's checkpoint new values; memory is not touched.

    Args:
        model: Its checkpoint is the base, whatever dtype it was loaded in.
        selections: Parameter name -> entries that get a new value.
        change: Name and old entries, in float32 or wider -> the new entries.
        mask: Where changes are allowed.
        provenance: JSON values to keep; the mask's own provenance is added.
    """
    base = stored(model)
    entries: dict[str, tuple[Selection, Tensor]] = {}
    for name, selection in selections.items():
        old = selection.take(base.read(name))
        entries[name] = selection, change(name, old.to(torch.promote_types(old.dtype, torch.float32)))
    return WeightDelta.of_entries(model, entries, mask, {**provenance, "mask": dict(mask.provenance)})


def weight_delta(
    model: Model, mask: WeightMask, deltas: Trained, training: Training, provenance: Mapping[str, Any]
) -> WeightDelta:
    """The trained deltas as the artefact: old and new values of the mask's entries, nothing else."""
    base = stored(model)
    source = generator(training.seed, "rounding", 0)

    def change(name: str, old: Tensor) -> Tensor:
        new = old + deltas.dense(name).to(old)
        return stochastically_rounded(new, base.read(name).dtype, source) if stochastic else new

    stochastic = training.rounding == "stochastic"
    return changed(model, deltas.selections, change, mask, provenance)
