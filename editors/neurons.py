"""Switch located FFN neurons off, down or up, in one stroke and without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from editors.result import changed, settings_of
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model


@dataclass(frozen=True)
class ScaleNeurons:
    """Multiply one part of each located neuron by a factor: 0 switches it off, 2 doubles it.

    Knowledge neurons (Dai et al. 2022, arXiv:2104.08696) are suppressed with 0 and enhanced with 2; DEPN
    (Wu et al. 2023, arXiv:2310.20138) erases with 0. Scaling the down column (the value vector) scales the
    neuron's whole contribution to the residual stream by exactly that factor.
    """

    factor: float = 0.0
    """What the weights are multiplied with."""
    part: Literal["down", "up", "gate"] = "down"
    """Down column (output), up row or gate row (input, with their biases) of each neuron in the mask."""

    def run(
        self,
        model: Model,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        mask: WeightMask,
        *,
        text: Sequence[str] = (),
        folder: Path | None = None,
        resume: bool = False,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> WeightDelta:
        """Scale the located neurons; facts and text are not looked at, the model in memory is not touched.

        Raises:
            InputError: a mask of another model, or one that holds no weight of that part.
        """
        mask.check(model)
        every_neuron = torch.ones(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
        chosen = (mask & WeightMask.of_neurons(model.atlas, every_neuron, (self.part,))).entries
        if not chosen:
            raise InputError(
                f"the mask holds no {self.part} weights of neurons; locate with --parts {self.part}"
            )
        return changed(model, chosen, lambda _, old: old * self.factor, mask, {"editor": settings_of(self)})
