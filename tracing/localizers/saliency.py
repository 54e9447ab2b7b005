"""Gradient x activation saliency of every neuron.

For a neuron with activation h, the change of the target's log-probability when h is removed is to first order
    s = sum over positions of h * d log p(target) / dh,
which equals weight * gradient summed over its value vector, or over its up key vector (see `neuron_gradients`). Cost:
one forward and one backward per example; no weight gradient, memory of one [layer, neuron] grid.

Sources: Michel et al. 2019 (arXiv:1905.10650) for h * gradient as importance; SalUn (Fan et al. 2024,
arXiv:2310.12508) for summing over the forget set before the absolute value; the ratio against a retain set is
what selects in selective synaptic dampening (Foster et al. 2024, arXiv:2308.07707).

Use it first: it is the cheapest localizer that knows the target, and a good prefilter for the exact ones.
With a retain set, `contrast="difference"` takes away the neurons that every fact of the kind needs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.forward import Batch
from locus.model import Model
from locus.scores import NeuronScores
from tracing.checked_settings import checked_choices
from tracing.gradients.neuron_gradients import neuron_grid, prediction_positions, visit_neurons
from tracing.localizer import Cost, ExampleLoop, Examples, required

Absolute = Literal["end", "example", "position", "never"]


@dataclass(frozen=True)
@checked_choices
class GradientSaliency:
    """Activation x gradient of the target's log-probability, a score for every neuron."""

    absolute: Absolute = "end"
    """When the absolute value is taken: at the end, after summing over examples (SalUn's order, equal to
    |sum of weight * gradient| of the whole forget set); of each example's sum; of each position's product;
    or never, so that a neuron that lowers the target's probability scores below zero."""
    contrast: Literal["none", "difference", "ratio"] = "none"
    """Against the retain set's score r: not at all; f - strength * r; or f / (|r| + 1e-3 * mean |r|)."""
    strength: float = 1.0
    """Weight of the retain set's score in the difference."""
    positions: Literal["all", "prediction"] = "all"
    """Sum over all positions, or only over those whose logits predict a target token."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward per example, over both sets when they are contrasted."""
        n_examples = len(facts) + (len(retain or ()) if self.contrast != "none" else 0)
        return Cost(n_examples, n_examples)

    def run(
        self,
        model: Model,
        facts: Examples,
        retain: Examples | None = None,
        *,
        batch_tokens: int = 4096,
    ) -> NeuronScores:
        """Score every neuron on `facts`, contrasted with `retain` if the settings say so.

        Raises:
            InputError: no facts, or a contrast without a retain set.
        """
        values = self._saliency(model, facts, "facts", batch_tokens)
        if self.contrast != "none":
            kept = self._saliency(
                model, required(retain, f"contrast {self.contrast!r}"), "retain", batch_tokens
            )
            values = _contrasted(values, kept, self.contrast, self.strength)
        return NeuronScores(values.cpu(), "saliency", model.fingerprint, model.atlas, asdict(self))

    def _saliency(
        self, model: Model, facts: Examples, what: str, batch_tokens: int
    ) -> Float[Tensor, "layer neuron"]:
        loop = ExampleLoop.of(model, facts, "its saliency", what)
        (total,) = loop.over_batches(partial(self._of_batch, model), f"saliency, {what}", batch_tokens)
        total /= len(loop.encoded)
        return total.abs() if self.absolute == "end" else total

    def _of_batch(self, model: Model, batch: Batch) -> tuple[Float[Tensor, "layer neuron"]]:
        """The sum over a batch's examples."""
        where = prediction_positions(batch) if self.positions == "prediction" else None
        grid = neuron_grid(model)

        def visit(layer: int, h: Tensor, gradient: Tensor) -> None:
            product = h.float() * gradient.float()
            if where is not None:
                product = product * where[..., None].to(product.device)
            if self.absolute == "position":
                product = product.abs()
            by_example = product.sum(1)
            if self.absolute == "example":
                by_example = by_example.abs()
            grid[layer] = by_example.sum(0).to(grid.device)

        visit_neurons(model, batch, visit)
        return (grid,)


def _contrasted(
    forget: Float[Tensor, "layer neuron"],
    retain: Float[Tensor, "layer neuron"],
    contrast: Literal["difference", "ratio"],
    strength: float,
) -> Float[Tensor, "layer neuron"]:
    """Forget scores against retain scores, both means over examples."""
    if contrast == "difference":
        return forget - strength * retain
    size = retain.abs()
    floor = torch.clamp(1e-3 * size.mean(), min=torch.finfo(size.dtype).tiny)
    return forget / (size + floor)


@dataclass(frozen=True)
@checked_choices
class ActivationGradient:
    """Activation x gradient at the positions that predict the target (one target token: the prompt's last).

    The one-point case of knowledge neurons' integrated gradients: what the last position writes for the
    answer, without the neurons that recognise the subject.
    """

    absolute: Absolute = "example"
    """When the absolute value is taken; see `GradientSaliency`."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward per fact."""
        return Cost(len(facts), len(facts))

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
        saliency = GradientSaliency(absolute=self.absolute, positions="prediction")
        scores = saliency.run(model, facts, batch_tokens=batch_tokens)
        return NeuronScores(
            scores.values, "activation-gradient", model.fingerprint, model.atlas, asdict(self)
        )
