"""Change the located weights and nothing else: one file an editor or objective, one table of them all."""

from __future__ import annotations

from editors.ga import GA
from editors.graddiff import GradDiff
from editors.neurons import ScaleNeurons
from editors.npo import NPO
from editors.retain import Retain
from editors.training import Training

OBJECTIVES: dict[str, type] = {
    "ga": GA,
    "graddiff": GradDiff,
    "npo": NPO,
}
"""Objectives of the masked training loop, by their names on the command line."""

EDITORS: dict[str, type] = {**OBJECTIVES, "scale-neurons": ScaleNeurons}
"""Everything with a `run`: the trained objectives and the direct edits of weights."""

__all__ = ["EDITORS", "GA", "NPO", "OBJECTIVES", "GradDiff", "Retain", "ScaleNeurons", "Training"]
