"""Neurons by indirect effect: what restoring each neuron in the corrupted run would give back.

The question of causal tracing (Meng et al. 2022, arXiv:2202.05262), asked of single neurons: with the subject
corrupted by noise, how much likelier does the target become when one neuron, at all positions, gets the activation
of the clean run? To first order (attribution patching, Nanda 2023) that is
    sum over positions of (h_clean - h_corrupted) * d log p(target) / dh,   taken in the corrupted run,
mean over draws of the noise and over facts. Cost: a fact's clean forward, and one forward and one backward per draw.

Use it where the subject matters: unlike saliency it ignores neurons that are as active without it, such as those
that only know the kind of answer. For exact effects of single cells see `CausalTrace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.hooks import record
from locus.model import Model
from locus.scores import NeuronScores
from locus.tokens import Encoded, encode
from tracing.checked_settings import checked_choices
from tracing.gradients.neuron_gradients import neuron_grid, tapped
from tracing.localizer import Cost, ExampleLoop, Examples, encode_facts
from tracing.patching.corruption import Corrupter, Prepared, prepare
from tracing.patching.plain_engine import logits_of
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs

NeuronCorruption = Literal["gaussian", "swap"]


@dataclass(frozen=True)
@checked_choices
class TracedNeurons:
    """First-order indirect effect of every neuron."""

    samples: int = 4
    """Draws of the corruption."""
    corruption: NeuronCorruption = "gaussian"
    """Noise on the subject's embeddings, or another fact's subject in its place."""
    noise: float = 3.0
    """Standard deviation of the noise, in those of the subjects' embeddings."""
    seed: int = 0
    """Of the draws."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """A clean forward, and a forward and a backward per draw, for each fact."""
        return Cost(len(facts) * (1 + self.samples), len(facts) * self.samples)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Score every neuron on `facts`; a retain set is not used.

        Raises:
            InputError: no facts, no samples, or tokens instead of facts (what is the subject?).
        """
        at_least_one_draw(self.samples)
        prepared = prepare_all(model, facts, self.seed)
        corrupter = Corrupter.of(model, prepared, self.corruption, self.noise)
        loop = ExampleLoop(model, facts, [one.encoded for one in prepared], "its indirect effect")

        def of_fact(number: int) -> tuple[Tensor]:
            one = prepared[number]
            corrupted = corrupter.inputs(model, one, self.samples)
            return (_effects(model, one, corrupted, max(1, batch_tokens // len(one.ids))) / len(prepared),)

        (total,) = loop.over_examples(of_fact, "neurons by indirect effect")
        return NeuronScores(total.cpu(), "traced-neurons", model.fingerprint, model.atlas, asdict(self))


def at_least_one_draw(samples: int) -> None:
    """Refuse to corrupt a subject no times."""
    if samples < 1:
        raise InputError(f"samples is {samples}: the subject is corrupted at least once")


def prepare_all(model: Model, facts: Examples, seed: int) -> list[Prepared]:
    """Facts with their tokens and what of them is corrupted; a bare example has no subject, so its prompt is.

    Raises:
        InputError: no facts, or tokens instead of facts.
    """
    encode_facts(model, facts)
    return [
        prepare(_as_fact(fact, i), encode(model, fact).without_end, model.bos, seed)
        for i, fact in _given(facts)
    ]


def _given(facts: Examples) -> Sequence[tuple[int, Fact | Example]]:
    given = []
    for i, fact in enumerate(facts):
        if isinstance(fact, Encoded):
            raise InputError("what is corrupted is a fact's subject: give facts, not tokens")
        given.append((i, fact))
    return given


def _as_fact(fact: Fact | Example, index: int) -> Fact:
    return fact if isinstance(fact, Fact) else Fact(id=str(index), prompt=fact.prompt, target=fact.target)


def _effects(
    model: Model, prepared: Prepared, corrupted: Inputs, at_once: int
) -> Float[Tensor, "layer neuron"]:
    """Mean over draws of (h_clean - h_corrupted) * gradient, summed over positions."""
    readout = Readout("logprob", torch.tensor(prepared.encoded.target_ids))
    names = model.atlas.neuron_in
    with torch.no_grad(), record(model.module, inputs=names) as clean:
        logits_of(model, Inputs(prepared.ids), prepared.reads, 1)
    total = neuron_grid(model)

    def add(layer: int, h: Tensor, gradient: Tensor) -> None:
        change = clean.inputs[names[layer]].float() - h.float()
        total[layer] += (change * gradient.float()).sum((0, 1)).to(total.device)

    for start in range(0, corrupted.samples, at_once):
        embeddings = corrupted.embeddings
        some = None if embeddings is None else embeddings[start : start + at_once]
        part = Inputs(corrupted.ids, corrupted.positions, some)
        with torch.enable_grad(), tapped(model, add):
            logits = logits_of(model, part, prepared.reads, part.samples)
            readout(logits)[:, 0].sum().backward()
    return total / corrupted.samples
