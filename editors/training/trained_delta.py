"""From trained deltas to the artefact, in the checkpoint's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from editors.deltas import changed
from editors.training.parametrize import Trained
from editors.training.rounding import stochastically_rounded
from editors.training.settings import Training
from locus.delta import WeightDelta
from locus.mask import WeightMask
from locus.model import Model
from locus.random_streams import generator
from locus.weight_source import stored


def weight_delta(
    model: Model, mask: WeightMask, deltas: Trained, training: Training, provenance: Mapping[str, Any]
) -> WeightDelta:
    """The trained deltas as the artefact: old and new values of the mask's entries, nothing else.

    Args:
        model: The base; its checkpoint gives the old values and the dtype.
        mask: The weights that may change.
        deltas: The trained values.
        training: How values are rounded, and the seed of stochastic rounding.
        provenance: JSON values to keep in the artefact.
    """
    base = stored(model)
    source = generator(training.seed, "rounding", 0)

    def change(name: str, old: Tensor) -> Tensor:
        new = old + deltas.dense(name).to(old)
        return stochastically_rounded(new, base.read(name).dtype, source) if stochastic else new

    stochastic = training.rounding == "stochastic"
    return changed(model, deltas.selections, change, mask, provenance)
