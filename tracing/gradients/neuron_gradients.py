"""Every neuron's activation and the gradient that reaches it, seen once in a single backward pass.

A neuron is one unit between an MLP's up and down projections. The loss depends on its key vectors (rows of gate and
up) and its value vector (column of down) only through its activation h. So the sum over positions of h * dL/dh equals
the sum of weight * gradient over the value vector, and over the up key vector of a gated MLP: no weight gradient is
needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locus.forward import Batch, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model

Visit = Callable[[int, Tensor, Tensor], None]
"""Called once a layer in the backward pass with (layer, activation, gradient), both [batch pos neuron]."""


def label_logprobs(model: Model, batch: Batch) -> Float[Tensor, " label"]:
    """Log-probability of every label, in nats, float32; differentiable."""
    return -label_nll(label_logits(model, batch), batch)


def prediction_positions(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """True at the positions whose logits predict a label; with a one-token target, the last of the prompt."""
    where = torch.zeros(batch.ids.shape, dtype=torch.bool, device=batch.ids.device)
    where[batch.rows, batch.cols] = True
    return where


class _Tap(torch.autograd.Function):
    """The identity; its backward pass shows the activation and its gradient to a visitor."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, layer: int, visit: Visit) -> Tensor:
        ctx.save_for_backward(h)
        ctx.layer, ctx.visit = layer, visit
        return h.clone()  # no view: Falcon adds to an MLP's output in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        ctx.visit(ctx.layer, h.detach(), gradients[0])
        return gradients[0], None, None


def show_gradient(tensor: Tensor, layer: int, visit: Visit) -> Tensor:
    """The tensor itself; when it is differentiated, `visit` is shown it and its gradient."""
    start = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    return _Tap.apply(start, layer, visit)  # type: ignore[no-any-return, no-untyped-call]


def tapped(model: Model, visit: Visit) -> AbstractContextManager[object]:
    """Show every neuron's activation and gradient to `visit` when forwards run inside are differentiated.

    Args:
        model: Its weights stay frozen; the graph starts at the first layer's neurons.
        visit: See `Visit`.
    """

    taps: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(show_gradient, layer=layer, visit=visit)
        for layer, name in enumerate(model.atlas.neuron_in)
    }
    return patched(model.module, inputs=taps)


def visit_neurons(
    model: Model,
    batch: Batch,
    visit: Visit,
    objective: Callable[[Float[Tensor, " label"]], Float[Tensor, ""]] = torch.sum,
) -> float:
    """One forward and one backward of a batch, showing every neuron's activation and gradient.

    Args:
        model: Its weights get no gradient.
        batch: Examples in separate rows, so that the gradient of a sum over them is each one's own.
        visit: Called once a layer, last layer first.
        objective: From the labels' log-probabilities (nats) to the scalar that is differentiated; by default
            their sum, so gradients say what raises log p(target).

    Returns:
        The scalar's value.
    """
    with torch.enable_grad(), tapped(model, visit):
        value = objective(label_logprobs(model, batch))
        value.backward()
    return float(value.detach())


def neuron_grid(model: Model) -> Float[Tensor, "layer neuron"]:
    """Zeros, one per neuron, to accumulate in (float32 on the model's device)."""
    return torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, device=model.device)
