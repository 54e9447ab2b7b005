"""Deltas in the checkpoint's own dtype: of new values for selected entries, or of another strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from locus.delta import WeightDelta
from locus.errors import InputError
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from locus.weight_source import stored


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


def scaled(model: Model, delta: WeightDelta, strength: float) -> WeightDelta:
    """The delta whose change is `strength` times as large: old + strength * (new - old), in the checkpoint's dtype.

    0 is the base, 1 the edit, more goes on past it (Ilharco et al. 2022, arXiv:2212.04089, scale task vectors so).

    Args:
        model: The base; memory is not touched.
        delta: An edit of it.
        strength: Not negative.

    Raises:
        InputError: a negative strength.
    """
    if strength < 0:
        raise InputError(f"strength {strength}: must not be negative")
    selections = {name: change.selection for name, change in delta.changes.items()}

    def change(name: str, old: Tensor) -> Tensor:
        return old + strength * (delta.changes[name].new.to(old) - old)

    where = WeightMask(selections, delta.base_fingerprint)
    return changed(model, selections, change, where, {**delta.provenance, "strength": strength})
