"""Zero-out: how much likelier the target is with a neuron than without it, exactly.

    score = mean over facts of log p(target) - log p(target | the neuron is 0 at all positions)

Source: "Zero-out" in Chang et al. 2024 (arXiv:2311.09060). One run per neuron is expensive, so first-order scores
(`GradientSaliency`, signed) choose the candidates and only those are run: silencing a neuron changes nothing
before its layer's output, so each run starts at the next block (`replay`). Neurons that are not candidates keep
their first-order score, scaled to stay below every candidate.

Use it where an effect must be real and not a slope: saturated answers (p near 1), or a short list to be checked.
Cost: one forward and one backward per fact, then about candidates / 2 forwards of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.model import Model
from locus.scores import NeuronScores, count_of
from locus.tokens import Encoded
from tracing.checked_settings import checked_choices
from tracing.engine import Engine
from tracing.engine import EngineName as PatchEngine
from tracing.localizer import Cost, ExampleLoop, Examples
from tracing.localizers.saliency import GradientSaliency
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs, PatchingQuestion
from tracing.patching.sites import Patch, PatchedRun


@dataclass(frozen=True)
@checked_choices
class ZeroOut:
    """Exact effect of silencing single neurons, over the best candidates of the first-order score."""

    candidates: float = 0.02
    """Share of all neurons that is run; 1 runs every neuron."""
    engine: PatchEngine = "auto"
    """How the runs are computed: replayed from the changed layer on, or whole forwards."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """The first-order scores, then the blocks from its layer on per candidate and fact.

        Candidates are taken to lie evenly over the layers; those of the last layer run next to nothing, because
        only the positions that are read change. The engine's check of itself, a few forwards a run, is not counted.
        """
        n_runs, n_layers = len(facts) * self._count(model), model.atlas.n_layers
        blocks = (n_layers + 1) / 2 - 1 / n_layers
        return Cost(len(facts) + n_runs * blocks / n_layers, len(facts))

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Silence the candidates one by one on every fact; a retain set is not used.

        Raises:
            InputError: no facts, or a share outside (0, 1].
        """
        count = self._count(model)
        slope = GradientSaliency(absolute="never").run(model, facts, batch_tokens=batch_tokens).values
        chosen = slope.flatten().topk(count).indices.sort().values
        layers, neurons = chosen // model.atlas.d_mlp, chosen % model.atlas.d_mlp
        where = [(int(layer), int(neuron)) for layer, neuron in zip(layers, neurons, strict=True)]
        engine = Engine(model, self.engine, batch_tokens)
        loop = ExampleLoop.of(model, facts, "its drop without a neuron")
        encoded = loop.encoded

        def of_fact(number: int) -> tuple[Tensor]:
            return (silenced_drop(engine, encoded[number], where) / len(encoded),)

        (drop,) = loop.over_examples(of_fact, "zeroing neurons")
        values = _below(slope, float(drop.min()))
        values[layers, neurons] = drop.float()
        return NeuronScores(values, "zero-out", model.fingerprint, model.atlas, asdict(self))

    def _count(self, model: Model) -> int:
        if not 0 < self.candidates <= 1:
            raise InputError(f"candidates {self.candidates}: a share of all neurons, above 0 and at most 1")
        return count_of(float(self.candidates), model.atlas.n_layers * model.atlas.d_mlp)


def silenced_drop(
    engine: Engine, encoded: Encoded, where: list[tuple[int, int]]
) -> Float[Tensor, " candidate"]:
    """Nats of log p(target) lost when each (layer, neuron) is 0 at all positions."""
    inputs = Inputs(torch.tensor(encoded.ids[:-1]))  # the last target token is read by nobody
    n_pos = len(inputs.ids)
    reads = tuple(range(encoded.target_start - 1, n_pos))
    everywhere = tuple(range(n_pos))
    cells = [
        PatchedRun((Patch("mlp_post", (layer, layer + 1), everywhere, "zero", (neuron,)),))
        for layer, neuron in where
    ]
    readout = Readout("logprob", torch.tensor(encoded.target_ids))
    answers = engine.answer(PatchingQuestion(inputs, inputs, reads), cells, readout)
    return (answers.base[0, 0] - answers.cells[:, 0, 0]).double().cpu()


def _below(slope: Float[Tensor, "layer neuron"], floor: float) -> Float[Tensor, "layer neuron"]:
    """The same order, all values below `floor`."""
    span = (slope.max() - slope.min()).clamp(min=torch.finfo(slope.dtype).tiny)
    return floor - 1e-3 * abs(floor) - 1e-6 - (slope.max() - slope) / span
