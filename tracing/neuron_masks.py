"""Learned masks: which neurons can be switched off without losing the target.

A gate in [0, 1] multiplies each neuron's activation at every position. The gates are trained to keep the
target likely while a penalty pushes them shut; what stays open carries the target.

- `Slimming` (Liu et al. 2017, arXiv:1708.06519): gates start at 1 and are clipped to [0, 1]; the loss is
      NLL + penalty * mean |m|;  score = m.
- `HardConcrete` (Louizos et al. 2018, arXiv:1712.01312): random gates with a learned location s,
      m = clip(1.2 * sigmoid((log u - log(1 - u) + s) / temperature) - 0.1, 0, 1),  u uniform, and a penalty on
      the chance of not being shut;  score = sigmoid(s).

Both as localizers of memorized text: Chang et al. 2024 (arXiv:2311.09060), the strongest of theirs. Cost: one
forward and one backward an example and step, a hundred times gradient saliency; use them when the mask has to be
small and the number of facts is. NLL is in nats a target token, the mean over examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locus.forward import Batch, batches
from locus.hooks import patched
from locus.model import Model
from locus.progress import task
from locus.scores import NeuronScores
from locus.together import each
from tracing.cost import Cost
from tracing.neuron_gradients import Examples, encode_facts, label_logprobs

STRETCH = (-0.1, 1.1)
"""Interval the hard concrete gate is stretched to before it is clipped to [0, 1]."""


@contextlib.contextmanager
def gated(model: Model, gates: Float[Tensor, "layer neuron"]) -> Iterator[None]:
    """Multiply every neuron's activation, at all positions, by its gate in the forwards run inside."""

    def multiply(layer: int, h: Tensor) -> Tensor:
        return h * gates[layer].to(h)

    patches = {name: partial(multiply, layer) for layer, name in enumerate(model.atlas.neuron_in)}
    with patched(model.module, inputs=patches):
        yield


def gated_nll(
    model: Model, groups: list[Batch], n_examples: int, gates: Float[Tensor, "layer neuron"]
) -> float:
    """NLL of the targets behind `gates`, in nats a token, mean over examples; its gradient goes into the gates.

    Batch by batch: the graph of one is gone before the next is made.
    """

    def of_batch(batch: Batch) -> tuple[Tensor, Tensor]:
        lengths = torch.bincount(batch.rows, minlength=len(batch.examples))
        weights = (1.0 / lengths)[batch.rows]
        leaf = gates.detach().requires_grad_()
        with torch.enable_grad(), gated(model, leaf):
            logprobs = label_logprobs(model, batch)
            nll = -(logprobs * weights.to(logprobs.device)).sum() / n_examples
        (gradient,) = torch.autograd.grad(nll, leaf)
        return nll.detach().double(), gradient

    total = 0.0
    for nll, gradient in each(groups, of_batch, "one step"):
        total += float(nll)
        gradient = gradient.to(gates.device)
        gates.grad = gradient if gates.grad is None else gates.grad.add_(gradient)
    return total


@dataclass(frozen=True)
class Slimming:
    """Gates trained by Adam, clipped to [0, 1], pushed shut by an L1 penalty."""

    penalty: float = 20.0
    """Weight of the mean gate, in nats."""
    learning_rate: float = 0.02
    """Adam's, for the gates."""
    steps: int = 100
    """Adam steps, each over all facts."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward a fact and step."""
        return Cost(len(facts), len(facts)) * self.steps

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Train the gates on `facts`; a retain set is not used.

        Raises:
            InputError: no facts.
        """
        gates = torch.ones(model.atlas.n_layers, model.atlas.d_mlp, device=model.device, requires_grad=True)

        def step(accumulate: Callable[[Tensor], float]) -> float:
            nll = accumulate(gates)
            (self.penalty * gates.mean()).backward()
            return nll

        def clip() -> None:
            gates.clamp_(0, 1)

        _descend(model, facts, gates, step, clip, self.learning_rate, self.steps, batch_tokens)
        values = gates.detach().cpu()
        return NeuronScores(values, "slimming", model.fingerprint, model.atlas, asdict(self))


@dataclass(frozen=True)
class HardConcrete:
    """Random gates whose locations are trained by Adam under a penalty on their number."""

    CUT: ClassVar[float] = 0.5
    """Gates above it are open more likely than not."""

    penalty: float = 20.0
    """Weight of the mean probability of not being shut, in nats."""
    learning_rate: float = 0.1
    """Adam's, for the locations."""
    steps: int = 200
    """Adam steps, each over all facts with a fresh draw of the gates."""
    temperature: float = 2 / 3
    """Of the concrete distribution; lower is closer to 0 or 1."""
    initial: float = 2.0
    """First value of every location s; 2 opens a gate with probability 0.98."""
    seed: int = 0
    """Of the draws."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward a fact and step."""
        return Cost(len(facts), len(facts)) * self.steps

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Train the gates' locations on `facts`; a retain set is not used.

        Raises:
            InputError: no facts.
        """
        shape = (model.atlas.n_layers, model.atlas.d_mlp)
        location = torch.full(shape, self.initial, device=model.device, requires_grad=True)
        generator = torch.Generator().manual_seed(self.seed)

        def step(accumulate: Callable[[Tensor], float]) -> float:
            uniform = torch.rand(shape, generator=generator).to(location.device)
            gates = hard_concrete(location, uniform, self.temperature)
            leaf = gates.detach().requires_grad_()
            nll = accumulate(leaf)
            open_ = open_probability(location, self.temperature).mean()
            torch.autograd.backward([gates, self.penalty * open_], [leaf.grad, None])
            return nll

        _descend(model, facts, location, step, None, self.learning_rate, self.steps, batch_tokens)
        values = location.detach().sigmoid().cpu()
        return NeuronScores(values, "hard-concrete", model.fingerprint, model.atlas, asdict(self))


def hard_concrete(
    location: Float[Tensor, "*gate"], uniform: Float[Tensor, "*gate"], temperature: float
) -> Float[Tensor, "*gate"]:
    """Gates in [0, 1] for uniform draws; differentiable in the location where a gate is not clipped."""
    low, high = STRETCH
    soft = torch.sigmoid((torch.logit(uniform, eps=1e-6) + location) / temperature)
    return (soft * (high - low) + low).clamp(0, 1)


def open_probability(location: Float[Tensor, "*gate"], temperature: float) -> Float[Tensor, "*gate"]:
    """Chance that a hard concrete gate is above 0."""
    low, high = STRETCH
    shift = temperature * float(torch.tensor(-low / high).log())
    return torch.sigmoid(location - shift)


def _descend(
    model: Model,
    facts: Examples,
    parameter: Tensor,
    step: Callable[[Callable[[Tensor], float]], float],
    clip: Callable[[], None] | None,
    learning_rate: float,
    steps: int,
    batch_tokens: int,
) -> None:
    """Adam on one [layer, neuron] parameter; `step` leaves the gradient in it and returns the NLL."""
    encoded = encode_facts(model, facts)
    groups = batches(encoded, batch_tokens)
    optimizer = torch.optim.Adam([parameter], lr=learning_rate)
    with task("learning gates", steps) as line:
        for _ in range(steps):
            optimizer.zero_grad()
            nll = step(partial(gated_nll, model, groups, len(encoded)))
            optimizer.step()
            if clip is not None:
                with torch.no_grad():
                    clip()
            line.advance(note=f"nll {nll:.3f}")
