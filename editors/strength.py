"""An edit weaker or stronger than it was trained: the line from the base through the edit."""

from __future__ import annotations

from torch import Tensor

from editors.result import changed
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.mask import WeightMask
from locus.model import Model


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
