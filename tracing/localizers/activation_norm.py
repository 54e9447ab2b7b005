"""Activation norm: how much each neuron writes while the target is predicted.

    score = mean over the positions that predict a target token of |h| * ||v||,  v the neuron's value vector.

Source: "Act" in Chang et al. 2024 (arXiv:2311.09060), who found it far behind the localizers that look at the
target. Cost: one forward per example, no backward.

Use it as the baseline that sees the text but not the answer: what beats random and not this one has found
where the model is busy, not where the fact is. Scores favour the last layers, whose activations are largest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.forward import Batch, label_logits
from locus.hooks import patched
from locus.model import Model
from locus.scores import NeuronScores
from locus.weight_source import held
from tracing.checked_settings import checked_choices
from tracing.gradients.neuron_gradients import neuron_grid, prediction_positions
from tracing.localizer import Cost, ExampleLoop, Examples


def down_norms(model: Model) -> Float[Tensor, "layer neuron"]:
    """Euclidean norm of every neuron's value vector: what one unit of its activation writes."""
    norms = neuron_grid(model)
    for layer, parts in enumerate(model.atlas.neurons):
        for part in parts:
            if part.role == "down":
                weight = held(model, part.param).float()
                columns = weight.norm(dim=1 - part.axis)
                norms[layer] = columns[part.offset : part.offset + model.atlas.d_mlp].to(norms.device)
    return norms


def mean_activations(
    model: Model,
    examples: Examples,
    *,
    positions: Literal["all", "prediction"] = "prediction",
    batch_tokens: int = 4096,
) -> Float[Tensor, "layer neuron"]:
    """Mean absolute activation of every neuron: over an example's positions first, then over examples."""
    loop = ExampleLoop.of(model, examples, "its activation")

    def of_batch(batch: Batch) -> tuple[Tensor]:
        where = batch.attention_mask.bool() if positions == "all" else prediction_positions(batch)
        weight = where / where.sum(1, keepdim=True)
        grid = neuron_grid(model)

        def look(layer: int, h: Tensor) -> None:
            grid[layer] = torch.einsum("bpn,bp->n", h.abs().float(), weight.to(h.device)).to(grid.device)

        looks = {name: partial(look, layer) for layer, name in enumerate(model.atlas.neuron_in)}
        with torch.no_grad(), patched(model.module, inputs=looks):
            label_logits(model, batch)
        return (grid,)

    (total,) = loop.over_batches(of_batch, "activations", batch_tokens)
    return total / len(loop.encoded)


@dataclass(frozen=True)
@checked_choices
class ActivationNorm:
    """Mean |activation| x norm of the value vector while the target is predicted."""

    positions: Literal["all", "prediction"] = "prediction"
    """Average over all positions, or over those whose logits predict a target token."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward per fact."""
        return Cost(len(facts), 0)

    def run(
        self,
        model: Model,
        facts: Examples,
        retain: Examples | None = None,
        *,
        batch_tokens: int = 4096,
    ) -> NeuronScores:
        """Score every neuron on `facts`; a retain set is not used.

        Raises:
            InputError: no facts.
        """
        size = mean_activations(model, facts, positions=self.positions, batch_tokens=batch_tokens)
        values = size * down_norms(model)
        return NeuronScores(values.cpu(), "activation-norm", model.fingerprint, model.atlas, asdict(self))
