"""Knowledge neurons: integrated gradients, shared by the paraphrases of a fact and not by other facts.

    attribution = h * (1/m) * sum over k = 1..m of dp(target)/dh at (k/m) h,  h the activation at the last position

For each prompt of a fact, neurons whose attribution reaches `threshold` of the largest are its coarse set (Dai et
al. 2022, arXiv:2104.08696). Refined are those in the coarse sets of at least `share` of the fact's prompts (the
prompt and its paraphrases), and of fewer than `negative_share` of its negative prompts (its neighbours:
questions of the same kind with other answers). Attributions: see `integrated`; with several target tokens, each
is predicted after the gold ones and the mean is taken.

A neuron's score is the number of facts that it is a knowledge neuron of, plus its mean attribution scaled into
(-1/2, 1/2): the first part orders as the paper's counting does, the second breaks its ties and gives the rest an
order. With `refine=False` the score is the mean attribution alone, the "IG" of Chang et al. 2024.

Use it for facts with paraphrases, to get few and specific neurons. Cost: of the one-token way, a forward and
about steps * layers / (2 * tokens) more of both for each prompt and target token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.model import Model
from locus.scores import NeuronScores
from locus.tokens import Encoded, encode
from tracing.checked_settings import checked_choices
from tracing.gradients.integrated_gradients import GradientEngineName, integrated_cost, integrated_gradients
from tracing.localizer import Cost, ExampleLoop, Examples


@dataclass(frozen=True)
@checked_choices
class KnowledgeNeurons:
    """Neurons that carry a fact's answer at the position that predicts it."""

    PAPER_THRESHOLD: ClassVar[float] = 0.5
    """Scores above it are refined knowledge neurons of at least one fact."""

    steps: int = 20
    """m, points of the integral."""
    threshold: float = 0.2
    """Share of a prompt's largest attribution that a neuron must reach."""
    share: float = 0.7
    """Share of a fact's prompts in whose coarse sets it must be."""
    negative_share: float = 0.5
    """Share of a fact's negative prompts in whose coarse sets it must not be; above 1 for no negatives."""
    refine: bool = True
    """False: mean attribution over the facts' own prompts, nothing counted."""
    engine: GradientEngineName = "auto"
    """How attributions are computed: one token at a time (exact), or whole forwards."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """See the module; paraphrases and negatives are prompts like any other."""
        groups = [group for fact in facts for group in self._prompts(model, fact)]
        return integrated_cost(model, [one for group in groups for one in group], self.steps)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Count the facts that each neuron is a knowledge neuron of; a retain set is not used.

        Raises:
            InputError: no facts, or a setting out of range.
        """
        loop = ExampleLoop.of(model, facts, "its attribution")

        def of_fact(number: int) -> tuple[Tensor, ...]:
            own, negative = self._prompts(model, facts[number])
            attributions = self._attributions(model, own, batch_tokens)
            share = torch.stack(attributions).mean(0) / len(facts)
            if not self.refine:
                return (share,)
            refined = self._refined(attributions, self._attributions(model, negative, batch_tokens))
            return share, refined.to(share)

        mean, *counts = loop.over_examples(of_fact, "knowledge neurons")
        values = mean
        for count in counts:
            values = count + 0.499 * mean / mean.abs().max().clamp(min=torch.finfo(mean.dtype).tiny)
        return NeuronScores(values.cpu(), "knowledge-neurons", model.fingerprint, model.atlas, asdict(self))

    def neurons(self, model: Model, fact: Fact, *, batch_tokens: int = 4096) -> list[tuple[int, int]]:
        """The refined knowledge neurons of one fact, as (layer, neuron)."""
        own, negative = self._prompts(model, fact)
        refined = self._refined(
            self._attributions(model, own, batch_tokens), self._attributions(model, negative, batch_tokens)
        )
        return [(int(layer), int(neuron)) for layer, neuron in refined.nonzero()]

    def _prompts(self, model: Model, fact: Fact | Example | Encoded) -> tuple[list[Encoded], list[Encoded]]:
        """The fact's own prompts, and its negative ones; a bare example has but itself."""
        if isinstance(fact, Encoded):
            return [fact], []
        if isinstance(fact, Example) or not self.refine:
            return [encode(model, fact).without_end], []
        own = [encode(model, fact), *(encode(model, one) for one in fact.paraphrase_examples)]
        own = [one.without_end for one in own]
        use_negatives = self.negative_share <= 1
        return own, [encode(model, one).without_end for one in fact.neighbours] if use_negatives else []

    def _attributions(
        self, model: Model, prompts: Sequence[Encoded], batch_tokens: int
    ) -> list[Float[Tensor, "layer neuron"]]:
        return [
            integrated_gradients(model, one, self.steps, engine=self.engine, batch_tokens=batch_tokens)
            for one in prompts
        ]

    def _refined(
        self,
        own: Sequence[Float[Tensor, "layer neuron"]],
        negative: Sequence[Float[Tensor, "layer neuron"]],
    ) -> Bool[Tensor, "layer neuron"]:
        if not 0 < self.threshold <= 1 or not 0 < self.share <= 1:
            raise InputError(
                f"threshold {self.threshold} and share {self.share}: both are shares, above 0 and at most 1"
            )
        shared = share_of_coarse(own, self.threshold) >= self.share - 1e-6
        if negative:
            shared &= share_of_coarse(negative, self.threshold) < self.negative_share - 1e-6
        return shared


def share_of_coarse(
    attributions: Sequence[Float[Tensor, "layer neuron"]], threshold: float
) -> Float[Tensor, "layer neuron"]:
    """Share of the prompts in whose coarse set (attribution >= threshold * largest > 0) each neuron is."""
    coarse = [one >= threshold * one.max().clamp(min=torch.finfo(one.dtype).tiny) for one in attributions]
    return torch.stack(coarse).float().mean(0)
