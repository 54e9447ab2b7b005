"""MEMIT: many facts at once, spread over several layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.aim import Aim
from editors.least_squares import Metric, within, write
from editors.located import (
    DownProjection,
    borrowed,
    chosen_layers,
    delta_of,
    down_projections,
    whole_projections,
)
from editors.ramp import Ramp
from editors.result import settings_of
from editors.statistics import second_moments
from editors.subject import Place, openings, retained
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text
from locus.mask import WeightMask
from locus.model import Model


@dataclass(frozen=True)
class MEMIT:
    """Mass-editing memory in a transformer (Meng et al. 2023, arXiv:2210.07229).

    Each layer's update is R Kᵀ (λ C + K Kᵀ)⁻¹: nearly what the facts' keys K are to become (the residuals R), at
    least cost to the text's second moment C. Facts edited in an earlier batch take part with a residual of zero.
    Where the mask holds only some neurons of a layer, keys and metric are those of these neurons.
    """

    layers: tuple[int, ...] = ()
    """Layers to edit, negative from the end; none for `most` of the mask's, nearest to a fifth of the depth."""
    most: int = 5
    """How many layers at most, where none are named."""
    aim: Aim = Aim(lr=0.1, clamp=0.75)
    """What the model should say instead, and how the state that makes it say so is found."""
    weight: float = 0.1
    """λ, as a share of the number of neurons a layer (the paper's 15,000 for GPT-J is 0.92)."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in C."""
    ridge: float = 1e-3
    """Added to C's diagonal, as a share of its mean."""
    moment_tokens: int = 100_000
    """Tokens of text that C is taken over, at most."""
    batch: int = 0
    """Facts edited at once; 0 for all."""
    place: Place = "subject"
    """Edit at the last token of the subject or of the prompt."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def own_mask(self, model: Model) -> WeightMask:
        """The down projections of the layers named, or of all: what may change where no mask is given."""
        return whole_projections(model, self.layers)

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
        """Edit the facts, batch after batch; the model in memory ends bit for bit as it was.

        Keys of retain facts that are not held out count in C; `text` is what the rest of it and the openings are
        taken from, by default the neutral text that comes with locus.

        Raises:
            InputError: no facts, a mask without down projections, or a fact without a subject.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        text = text or neutral_text()
        located = chosen_layers(
            down_projections(model, mask), model.atlas.n_layers, self.layers, max(1, self.most)
        )
        layers = [one.layer for one in located]
        prefixes = openings(text, self.aim.prefixes, self.aim.seed)
        moments = second_moments(
            model, layers, text, n_tokens=self.moment_tokens, batch_tokens=self.batch_tokens
        )
        kept = retained(model, retain, layers, prefixes, self.place, self.retain_weight, self.batch_tokens)
        metrics = {
            one.layer: Metric.of(within(moments[one.layer].mean + kept[one.layer], one.neurons), self.ridge)
            for one in located
        }
        written = Written(located)

        def solve(
            one: DownProjection, keys: Float[Tensor, "n fact"], residual: Float[Tensor, "d_model fact"]
        ) -> Float[Tensor, "d_model n"]:
            every, wanted = written.with_earlier(one, keys, residual)
            return write(metrics[one.layer], every, wanted, self.weight * model.atlas.d_mlp)

        with borrowed(model, written.updates):
            for start in range(0, len(forget), self.batch or len(forget)):
                facts = forget[start : start + (self.batch or len(forget))]
                ramp = Ramp.find(model, facts, located, self.aim, prefixes, self.place, self.batch_tokens)
                ramp.write_(solve, written.keep)
                written.done(facts, ramp, log)
        provenance = {
            "editor": settings_of(self),
            "layers": layers,
            "moment_tokens": moments[layers[0]].n_tokens,
            "conditions": [metrics[layer].condition for layer in layers],
            **written.about,
        }
        return delta_of(model, written.updates, mask, provenance)


class Written:
    """What has been written so far, layer by layer: keys of earlier batches, and the sums of the updates."""

    def __init__(self, located: Sequence[DownProjection]) -> None:
        self.updates = {
            one.param: (one, torch.zeros(one.allowed.shape, dtype=torch.float64)) for one in located
        }
        self.earlier = {one.layer: torch.zeros(len(one.neurons), 0, dtype=torch.float64) for one in located}
        self._fresh: list[tuple[int, Tensor]] = []
        self.about: dict[str, Any] = {"losses": {}, "missing": {}}

    def with_earlier(
        self,
        one: DownProjection,
        keys: Float[Tensor, "n fact"],
        residual: Float[Tensor, "d_model fact"],
    ) -> tuple[Float[Tensor, "n key"], Float[Tensor, "d_model key"]]:
        """Keys and residuals with those of earlier batches, which are to stay where they are, in front."""
        earlier = self.earlier[one.layer]
        still = residual.new_zeros(len(residual), earlier.shape[1])
        return torch.cat([earlier, keys], dim=1), torch.cat([still, residual], dim=1)

    def keep(
        self, one: DownProjection, keys: Float[Tensor, "n fact"], update: Float[Tensor, "d_model neuron"]
    ) -> None:
        """Note one layer's keys and update."""
        self._fresh.append((one.layer, keys))
        self.updates[one.param][1].add_(update)

    def done(
        self, facts: Sequence[Fact], ramp: Ramp, log: Callable[[Mapping[str, Any]], None] | None
    ) -> None:
        """Note a batch: its keys are from now on those of an earlier one."""
        for layer, keys in self._fresh:
            self.earlier[layer] = torch.cat([self.earlier[layer], keys], dim=1)
        self._fresh.clear()
        missing = ramp.missing().norm(dim=1) / ramp.found.shift.norm(dim=1).clamp_min(1e-12)
        for fact, loss, left in zip(facts, ramp.found.loss.tolist(), missing.tolist(), strict=True):
            self.about["losses"][fact.id], self.about["missing"][fact.id] = loss, left
            if log is not None:
                log({"fact": fact.id, "loss": loss, "missing": left, "steps": ramp.found.steps})
