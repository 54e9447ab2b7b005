"""Learned masks: which neurons can be switched off without losing the target.

A gate in [0, 1] multiplies each neuron's activation at every position. The gates are trained to keep the
target likely while a penalty pushes them shut; what stays open carries the target.

- `Slimming` (Liu et al. 2017, arXiv:1708.06519): gates start at 1 and are clipped to [0, 1]; the loss is
      NLL + penalty * mean |m|;  score = m.
- `HardConcrete` (Louizos et al. 2018, arXiv:1712.01312): random gates with a learned location s,
      m = clip(1.2 * sigmoid((log u - log(1 - u) + s) / temperature) - 0.1, 0, 1),  u uniform, and a penalty on
      the chance of not being shut;  score = sigmoid(s).

Both as localizers of memorized text: Chang et al. 2024 (arXiv:2311.09060), the strongest of theirs. As there, the
penalty weighs a mean over gates, and training ends while the gates can still be told apart. A gate stays open where
shutting it would cost more than penalty / number of gates; above a few hundred nats all gates fall together and
their order is what counts. The defaults ordered best on the dev sentences of the INJ benchmark
(benchmarks/README.md). Cost: one forward and one backward per example and step, 15 to 60 times gradient saliency; use
them when the number of facts is small. NLL is in nats per target token, the mean over examples.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.finite_checks import is_finite
from locus.forward import Batch, batches
from locus.hooks import patched
from locus.model import Model
from locus.parallel.map import each
from locus.progress import task
from locus.scores import NeuronScores
from tracing.gradients.neuron_gradients import label_logprobs
from tracing.localizer import Cost, ExampleLoop, Examples

STRETCH = (-0.1, 1.1)
"""Interval the hard concrete gate is stretched to before it is clipped to [0, 1]."""
Around = Callable[[Batch], AbstractContextManager[Any]]
"""What to enter, inside the gates, for the forward of a batch."""


@contextlib.contextmanager
def gated(
    model: Model, gates: Float[Tensor, "layer neuron"] | Float[Tensor, "row layer neuron"]
) -> Iterator[None]:
    """Multiply every neuron's activation, at all positions, by its gate in the forwards run inside.

    Args:
        model: Left as it is.
        gates: One for all rows of a batch, or one for each.
    """
    by_row = gates if gates.dim() == 3 else gates[None]

    def multiply(layer: int, h: Tensor) -> Tensor:
        return h * by_row[:, layer, None].to(h)

    patches = {name: partial(multiply, layer) for layer, name in enumerate(model.atlas.neuron_in)}
    with patched(model.module, inputs=patches):
        yield


def gated_nll(
    model: Model,
    groups: list[Batch],
    n_examples: int,
    gates: Float[Tensor, "mask layer neuron"],
    around: Around | None = None,
) -> Float[Tensor, " mask"]:
    """NLL of the targets behind `gates`, in nats per token; its gradient goes into the gates.

    Batch by batch: the graph of one is gone before the next is made.

    Args:
        model: Its weights get no gradient.
        groups: The examples.
        n_examples: How many they are.
        gates: One mask for all examples, whose NLL is their mean; or one for each, in the examples' order.
        around: Entered inside the gates for the forward of each batch.
    """
    shared = len(gates) == 1

    def of_batch(batch: Batch) -> tuple[Tensor, Tensor]:
        index = torch.tensor(batch.examples)
        lengths = torch.bincount(batch.rows, minlength=len(index))
        weights = (1.0 / lengths)[batch.rows] / (n_examples if shared else 1)
        leaf = gates.detach().requires_grad_()
        inside = contextlib.nullcontext() if around is None else around(batch)
        with torch.enable_grad(), gated(model, leaf if shared else leaf[index]), inside:
            logprobs = label_logprobs(model, batch)
            nll = -logprobs * weights.to(logprobs.device)
        (gradient,) = torch.autograd.grad(nll.sum(), leaf)
        owner = torch.zeros_like(batch.rows) if shared else index[batch.rows]
        return torch.zeros(len(gates)).index_add(0, owner, nll.detach().cpu()), gradient

    total = torch.zeros(len(gates))
    for nll, gradient in each(groups, of_batch, "one step"):
        total += nll
        gradient = gradient.to(gates.device)
        gates.grad = gradient if gates.grad is None else gates.grad.add_(gradient)
    return total


class LearnedMask(abc.ABC):
    """Adam on one [mask, layer, neuron] parameter, from which the gates are made."""

    METHOD: ClassVar[str]
    RANGE: ClassVar[tuple[float, float]] = (-float("inf"), float("inf"))
    """What the parameter is clipped to after each step."""
    penalty: float
    learning_rate: float
    steps: int
    stop: float

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """At most one forward and one backward per fact and step."""
        return Cost(len(facts), len(facts)) * self.steps

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Train one mask on all `facts`; a retain set is not used.

        Raises:
            InputError: no facts, or no steps.
        """
        values = self._trained(model, facts, batch_tokens=batch_tokens)[0]
        return self._scores(model, values)

    def run_each(
        self,
        model: Model,
        facts: Examples,
        *,
        around: Around | None = None,
        batch_tokens: int = 4096,
    ) -> list[NeuronScores]:
        """Train a mask on each fact, as if on it alone, side by side in a batch: several times as fast.

        Args:
            model: Left as it is.
            facts: One mask each.
            around: Entered inside the gates for the forward of each batch; may make other models of its rows.
            batch_tokens: Tokens computed at once.

        Raises:
            InputError: no facts, or no steps.
        """
        trained = self._trained(model, facts, apart=True, around=around, batch_tokens=batch_tokens)
        return [self._scores(model, values) for values in trained]

    def path(
        self,
        model: Model,
        facts: Examples,
        *,
        apart: bool = False,
        around: Around | None = None,
        batch_tokens: int = 4096,
    ) -> Iterator[Float[Tensor, "mask layer neuron"]]:
        """Scores after each step; those of a mask that is open by less than `stop` stay what they were then."""
        loop = ExampleLoop.of(model, facts, "the gradient of the gates")
        encoded = loop.encoded
        groups = batches(encoded, batch_tokens)
        shape = (len(encoded) if apart else 1, model.atlas.n_layers, model.atlas.d_mlp)
        parameter = torch.full(shape, self._start, device=model.device, requires_grad=True)
        optimizer = torch.optim.Adam([parameter], lr=self.learning_rate)
        ended = torch.zeros(len(parameter), dtype=torch.bool)
        held = parameter.detach().cpu()
        generator = torch.Generator().manual_seed(getattr(self, "seed", 0))
        with task("learning gates", self.steps) as line:
            for _ in range(self.steps):
                optimizer.zero_grad()
                gates = self._gates(parameter, generator)
                leaf = gates.detach().requires_grad_()
                nll = gated_nll(model, groups, len(encoded), leaf, around)
                if not is_finite(nll, *([] if leaf.grad is None else [leaf.grad])):
                    raise loop.at_fault(range(len(encoded)))
                pushed = self.penalty * self._open(parameter).mean((1, 2)).sum()
                torch.autograd.backward([gates, pushed], [leaf.grad, None])
                optimizer.step()
                with torch.no_grad():
                    parameter.clamp_(*self.RANGE)
                    held = torch.where(ended[:, None, None], held, self._score(parameter).cpu())
                    ended |= self._open(parameter).mean((1, 2)).cpu() < self.stop
                line.advance(note=f"nll {float(nll.mean()):.3f}")
                yield held
                if ended.all():
                    return

    def _trained(self, model: Model, facts: Examples, **how: Any) -> Float[Tensor, "mask layer neuron"]:
        """Where the path ends."""
        values = None
        for values in self.path(model, facts, **how):  # noqa: B007
            pass
        if values is None:
            raise InputError(f"steps is {self.steps}: a mask is learned in at least 1")
        return values

    def _scores(self, model: Model, values: Float[Tensor, "layer neuron"]) -> NeuronScores:
        settings: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return NeuronScores(values, self.METHOD, model.fingerprint, model.atlas, settings)

    @property
    @abc.abstractmethod
    def _start(self) -> float:
        """First value of every entry of the parameter."""

    @abc.abstractmethod
    def _gates(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        """What multiplies the activations this step."""

    @abc.abstractmethod
    def _open(self, parameter: Tensor) -> Tensor:
        """How open each gate is, from 0 to 1: what the penalty is on."""

    @abc.abstractmethod
    def _score(self, parameter: Tensor) -> Tensor:
        """What the gates are ordered by; no view of the parameter."""


@dataclass(frozen=True)
class Slimming(LearnedMask):
    """Gates trained by Adam, clipped to [0, 1], pushed shut by an L1 penalty."""

    METHOD: ClassVar[str] = "slimming"
    RANGE: ClassVar[tuple[float, float]] = (0, 1)

    penalty: float = 1000.0
    """Weight of the mean gate, in nats."""
    learning_rate: float = 0.02
    """Adam's, for the gates."""
    steps: int = 100
    """Adam steps at most, each over all facts."""
    stop: float = 0.7
    """Mean gate at which training ends: early to order neurons well, at 0.1 (with a penalty near 20) for a mask that
    is sparse by itself."""

    @property
    def _start(self) -> float:
        return 1.0

    def _gates(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        return parameter.view_as(parameter)

    def _open(self, parameter: Tensor) -> Tensor:
        return parameter

    def _score(self, parameter: Tensor) -> Tensor:
        return parameter.clone()


@dataclass(frozen=True)
class HardConcrete(LearnedMask):
    """Random gates whose locations are trained by Adam under a penalty on their number."""

    METHOD: ClassVar[str] = "hard-concrete"
    PAPER_THRESHOLD: ClassVar[float] = 0.5
    """Gates above it are open more likely than not."""

    penalty: float = 1000.0
    """Weight of the mean probability of not being shut, in nats."""
    learning_rate: float = 0.01
    """Adam's, for the locations."""
    steps: int = 60
    """Adam steps at most, each over all facts with a fresh draw of the gates."""
    stop: float = 0.77
    """Mean probability of not being shut at which training ends; 0.1 for a mask that is sparse by itself."""
    temperature: float = 2 / 3
    """Of the concrete distribution; lower is closer to 0 or 1."""
    initial: float = 2.0
    """First value of every location s; 2 opens a gate with probability 0.98."""
    seed: int = 0
    """Of the draws, which are the same for masks that are trained side by side."""

    @property
    def _start(self) -> float:
        if not self.temperature > 0:
            raise InputError(f"temperature is {self.temperature:g}: give one above 0")
        return self.initial

    def _gates(self, parameter: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(parameter.shape[1:], generator=generator)
        return hard_concrete(parameter, uniform.to(parameter.device).expand_as(parameter), self.temperature)

    def _open(self, parameter: Tensor) -> Tensor:
        return open_probability(parameter, self.temperature)

    def _score(self, parameter: Tensor) -> Tensor:
        return parameter.sigmoid()


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
