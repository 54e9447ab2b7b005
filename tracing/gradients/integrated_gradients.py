"""Integrated gradients of a token's probability over each layer's neurons at the position that predicts it.

For one layer with neuron activations h at that position, and p(a) the probability of the token when they are set
to a (every other position as it is):
    attribution = h * (1/m) * sum over k = 1..m of dp/da at a = (k/m) h,
the Riemann sum of Sundararajan et al. 2017 (arXiv:1703.01365) as knowledge neurons use it (Dai et al. 2022,
arXiv:2104.08696): one layer at a time, all its neurons scaled together.

Only the last position of the sequence is changed, and only from that layer on. So the keys and values of all
positions before it, and all states below, are those of one recorded forward, and each of the m points is a
single token run through the remaining blocks. The points of all layers travel together as one batch. The result
is exact, not an approximation; `attribute_plainly` is the same with whole forwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.hooks import patched, record
from locus.model import Model
from locus.tokens import Encoded
from tracing.gradients.neuron_gradients import neuron_grid
from tracing.localizer import Cost
from tracing.patching.plain_engine import logits_of
from tracing.patching.runs import Inputs
from tracing.replay.blocks import (
    CannotReplay,
    Recorded,
    Rows,
    Tail,
    failures_refuse_replay,
    masked_attention,
    record_whole,
)

GradientEngineName = Literal["auto", "one-token", "plain"]
GRADIENT_ENGINES: tuple[GradientEngineName, ...] = ("auto", "one-token", "plain")


def integrated_gradients(
    model: Model,
    encoded: Encoded,
    steps: int = 20,
    *,
    engine: GradientEngineName = "auto",
    batch_tokens: int = 4096,
) -> Float[Tensor, "layer neuron"]:
    """Attribution of every neuron, mean over the target's tokens; each is predicted after the gold ones.

    Args:
        model: Its weights get no gradient.
        encoded: Prompt and target.
        steps: m, points on the way from 0 to the activations.
        engine: "one-token", "plain", or "auto": one-token, or plain with a warning where the model's blocks
            cannot be called one by one.
        batch_tokens: Tokens computed at once.

    Raises:
        InputError: fewer than one step, an unknown engine, or "one-token" on a model that has none.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}: integrated gradients need at least 1")
    if engine not in GRADIENT_ENGINES:
        raise InputError(f"engine {engine!r}: not one of {', '.join(GRADIENT_ENGINES)}")
    total = neuron_grid(model)
    for end in range(encoded.target_start, len(encoded.ids)):
        seen, token = encoded.ids[:end], encoded.ids[end]
        total += _attribute(model, seen, token, steps, engine, batch_tokens)
    return total / encoded.n_target


def integrated_cost(model: Model, encoded: Sequence[Encoded], steps: int) -> Cost:
    """Of the one-token way: a forward per target token, then single tokens through half of the blocks."""
    points = steps * (model.atlas.n_layers + 1) / 2
    forwards = sum(one.n_target * (1 + points / len(one.ids)) for one in encoded)
    backwards = sum(one.n_target * points / len(one.ids) for one in encoded)
    return Cost(forwards, backwards)


def _attribute(
    model: Model, seen: Sequence[int], token: int, steps: int, engine: GradientEngineName, batch_tokens: int
) -> Float[Tensor, "layer neuron"]:
    if engine == "plain":
        return attribute_plainly(model, seen, token, steps, batch_tokens=batch_tokens)
    try:
        with masked_attention(model), failures_refuse_replay():
            return attribute_one_token(model, seen, token, steps, batch_tokens=batch_tokens)
    except CannotReplay as reason:
        if engine == "one-token":
            raise InputError(
                f"{model.name} has no one-token shortcut: {reason}; use the plain engine"
            ) from None
        warnings.warn(f"{model.name}: whole forwards, many times slower: {reason}", stacklevel=3)
        return attribute_plainly(model, seen, token, steps, batch_tokens=batch_tokens)


def attribute_one_token(
    model: Model, seen: Sequence[int], token: int, steps: int, *, batch_tokens: int = 4096
) -> Float[Tensor, "layer neuron"]:
    """Attributions for p(token) after the tokens `seen`, by single tokens behind recorded keys and values.

    Raises:
        CannotReplay: the model's blocks cannot be called one by one.
    """
    last, n_layers = len(seen) - 1, model.atlas.n_layers
    with torch.no_grad():
        inputs = Inputs(torch.tensor(seen))
        recorded = record_whole(model, inputs, [last], (), model.atlas.neuron_in)
        tail = Tail.of(recorded, [last])
    grid = neuron_grid(model)
    at_once = max(1, batch_tokens // (steps * len(seen)))  # every row holds the prompt's keys and values
    for first in range(0, n_layers, at_once):
        layers = range(first, min(first + at_once, n_layers))
        for layer, h, gradient in _one_token_gradients(model, recorded, tail, layers, token, steps):
            grid[layer] = (h.float() * gradient.float().mean(0)).to(grid.device)
    return grid


def _one_token_gradients(
    model: Model, recorded: Recorded, tail: Tail, layers: range, token: int, steps: int
) -> list[tuple[int, Float[Tensor, " neuron"], Float[Tensor, "step neuron"]]]:
    """For each of these layers its activations, and the gradient of p(token) at each point."""
    last = recorded.blocks.n_pos - 1
    names = model.atlas.neuron_in
    points: dict[int, Tensor] = {}
    hidden: Tensor | None = None
    with torch.enable_grad():
        for layer in range(layers.start, model.atlas.n_layers):
            patches: dict[str, Callable[[Tensor], Tensor]] = {}
            if layer in layers:
                h = recorded.inputs[names[layer]][0, last]
                points[layer] = _points(h, steps)
                state = recorded.hidden[layer][:, last:].expand(steps, -1, -1)
                hidden = state if hidden is None else torch.cat([hidden.to(state.device), state])
                patches[names[layer]] = _ending_with(points[layer])
            assert hidden is not None
            rows = _last_row(last, hidden)
            prefix = [(recorded.keys[layer][:, :, :last], recorded.values[layer][:, :, :last])]
            with patched(model.module, inputs=patches):
                hidden = recorded.blocks(layer, hidden, rows, prefix if last else [])
        assert hidden is not None
        probs = tail(hidden[:, 0]).float().softmax(-1)[:, token]
        gradients = torch.autograd.grad(probs.sum(), list(points.values()))
    found = zip(points, gradients, strict=True)
    return [(layer, recorded.inputs[names[layer]][0, last], gradient) for layer, gradient in found]


def _points(h: Float[Tensor, " neuron"], steps: int) -> Float[Tensor, "step neuron"]:
    """Points (k/m) h for k = 1..m, leaves of a graph."""
    shares = torch.arange(1, steps + 1, device=h.device) / steps
    return (shares[:, None] * h).to(h.dtype).requires_grad_()


def _ending_with(points: Float[Tensor, "step neuron"]) -> Callable[[Tensor], Tensor]:
    """Puts the points in the place of the last rows of a batch of single tokens."""

    def patch(h: Tensor) -> Tensor:
        return torch.cat([h[: h.shape[0] - len(points)], points[:, None]])

    return patch


def _last_row(last: int, hidden: Float[Tensor, "batch 1 d_model"]) -> Rows:
    """One row at position `last` for each batch element, which sees itself and all before it."""
    device = hidden.device
    return Rows(
        positions=torch.tensor([[last]], device=device),
        key_positions=torch.arange(last + 1, device=device)[None],
        visible=torch.ones(1, 1, last + 1, dtype=torch.bool, device=device),
        draws=hidden.shape[0],
    )


def attribute_plainly(
    model: Model,
    seen: Sequence[int],
    token: int,
    steps: int,
    *,
    batch_tokens: int = 4096,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "layer neuron"]:
    """The same attributions by whole forwards with hooks: the reference, and for models without a shortcut.

    Of `layers` only where some are named; the others' are 0.
    """
    inputs = Inputs(torch.tensor(seen))
    last = len(seen) - 1
    with torch.no_grad(), record(model.module, inputs=model.atlas.neuron_in) as recording:
        logits_of(model, inputs, [last], 1)
    grid = neuron_grid(model)
    for layer in range(model.atlas.n_layers) if layers is None else layers:
        name = model.atlas.neuron_in[layer]
        h = recording.inputs[name][0, last]
        for points in torch.split(_points(h, steps).detach(), max(1, batch_tokens // len(seen))):
            leaf = points.requires_grad_()

            def patch(all_: Tensor, leaf: Tensor = leaf) -> Tensor:
                return torch.cat([all_[:, :last], leaf[:, None]], dim=1)

            with torch.enable_grad(), patched(model.module, inputs={name: patch}):
                logits = logits_of(model, inputs, [last], len(leaf))
                prob = logits[:, 0].float().softmax(-1)[:, token].sum()
            (gradient,) = torch.autograd.grad(prob, leaf)
            grid[layer] += (h.float() * gradient.float().sum(0) / steps).to(grid.device)
    return grid
