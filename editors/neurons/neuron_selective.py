"""Change what located neurons write for the forget facts, and for them alone.

Plain zeroing takes every fact that a neuron serves. Here the neurons' values are changed so that what they write
together at the forget facts' positions becomes what they write, on average, for other facts, at least cost to what
they write over text and for the retain facts: the metric of ROME, on the located neurons only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import EditData
from editors.key_value.down_projections import DownProjection
from editors.key_value.key_positions import KeyRow, context_prefixes, row, states, with_prefix
from editors.key_value.least_squares import SecondMomentMetric, least_squares_update, within
from editors.key_value.neuron_parts import located_values, neuron_mask
from editors.key_value.second_moments import second_moments
from editors.strength import Direction, StrengthSearch, delta_at_strength
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text, trainable_facts
from locus.mask import WeightMask
from locus.model import Model

SelectivePositions = Literal["subject", "prompt", "after"]


@dataclass(frozen=True)
class NeuronSelective(StrengthSearch):
    """Contrastive ablation: located neurons write for the forget facts what they write for the others.

    With K the forget facts' activations of a layer's located neurons and k̄ the retain facts' mean, the values W
    become W + D, D the minimum of ‖D K − strength · W (k̄ − K)‖² + λ · tr(D C Dᵀ). Only values change; where the
    layer has few located neurons, C and K leave little room and more is lost elsewhere: see the strength curve.
    """

    where: SelectivePositions = "after"
    """Positions: the last token of the subject, the last of the prompt, or all from the one to the other."""
    strength: float = 1.0
    """1 is the mean over the retain facts; more overshoots."""
    weight: float = 0.02
    """λ, as a share of the number of located neurons of the layer."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in C."""
    prefixes: int = 2
    """Random context prefixes of every prompt; the prompt without one is always used too."""
    ridge: float = 1e-3
    """Added to C's diagonal, as a share of its mean."""
    moment_tokens: int = 100_000
    """Tokens of text that C is taken over, at most."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""
    seed: int = 0
    """Seed of the context prefixes."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where not in get_args(SelectivePositions):
            raise InputError(f"where = {self.where!r}: not one of {', '.join(get_args(SelectivePositions))}")
        if self.weight < 0 or self.retain_weight < 0:
            raise InputError("weight and retain_weight must not be negative")

    def own_mask(self, model: Model) -> WeightMask:
        """The values of the neurons listed: what may change where no mask is given."""
        return neuron_mask(model, self.neurons, "values")

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
        """Change the values; memory ends bit for bit as it was.

        Retain facts that are not held out say what the neurons write for other facts, and count in C.

        Raises:
            InputError: no facts, a mask without values of neurons, or a fact without a subject where one is needed.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        text = text or neutral_text()
        located = located_values(model, mask, self.neurons)
        layers = [one.layer for one in located]
        prefixes = context_prefixes(text, self.prefixes, self.seed)
        moments = second_moments(
            model, layers, text, n_tokens=self.moment_tokens, batch_tokens=self.batch_tokens
        )
        away = self._keys(model, forget, layers, prefixes)
        kept = self._keys(model, trainable_facts(retain), layers, prefixes)
        steps, conditions = {}, []
        for one in located:
            others = kept[one.layer][:, one.neurons]
            moment = within(moments[one.layer].mean, one.neurons)
            if len(others):
                moment = moment + self.retain_weight * others.mT @ others / len(others)
            metric = SecondMomentMetric.of(moment, self.ridge)
            mean = others.mean(0) if len(others) else torch.zeros(len(one.neurons), dtype=torch.float64)
            update = self._update(one, model, metric, away[one.layer][:, one.neurons].mT, mean)
            steps[one.param] = one.selection.take(one.stored_as(one.spread(update)).contiguous())
            conditions.append(metric.condition)
        return delta_at_strength(
            model,
            Direction({one.param: one.selection for one in located}, steps),
            mask,
            self.strength,
            self,
            EditData(forget, retain, text),
            provenance={"editor": settings_of(self), "layers": layers, "conditions": conditions},
            log=log,
        )

    def _update(
        self,
        one: DownProjection,
        model: Model,
        metric: SecondMomentMetric,
        keys: Float[Tensor, "n key"],
        mean: Float[Tensor, " n"],
    ) -> Float[Tensor, "d_model n"]:
        """One layer's update of strength 1."""
        values = one.weight(model)[:, one.neurons]
        lam = max(self.weight * len(one.neurons), 1e-6)
        return least_squares_update(metric, keys, values @ (mean[:, None] - keys), lam)

    def _keys(
        self, model: Model, facts: Sequence[Fact], layers: Sequence[int], prefixes: Sequence[str]
    ) -> dict[int, Float[Tensor, "key neuron"]]:
        """Activations at every position meant, of every fact after every context prefix."""
        sites = {layer: model.atlas.neuron_in[layer] for layer in layers}
        seen = [
            one
            for number, fact in enumerate(facts)
            for prefix in ("", *prefixes)
            for one in self._rows(model, with_prefix(fact, prefix), number)
        ]
        if not seen:
            return {layer: torch.zeros(0, model.atlas.d_mlp, dtype=torch.float64) for layer in layers}
        read, _ = states(model, seen, inputs=sites.values(), batch_tokens=self.batch_tokens)
        return {layer: read[site] for layer, site in sites.items()}

    def _rows(self, model: Model, fact: Fact, number: int) -> list[KeyRow]:
        last = row(model, fact, number, "prompt")
        if self.where == "prompt":
            return [last]
        first = row(model, fact, number, "subject")
        if self.where == "subject":
            return [first]
        return [KeyRow(last.encoded, at, number) for at in range(first.position, last.position + 1)]
