"""Privacy neurons: integrated gradients over a private text, counted over texts (DEPN, Wu et al. 2023).

    attribution = sum over target tokens of h * (1/m) * sum over k = 1..m of dp(token)/dh at (k/m) h

For each text, attributions (see `integrated`) are summed over all its target tokens; neurons that reach
`threshold` of the largest are the text's candidates, and candidates are ordered by the number of texts that have
them (arXiv:2310.20138). The score is that number plus the mean attribution scaled into (-1/2, 1/2), which breaks
ties. The paper erases the top 20 or so: `.top(20)`.

Use it for names, numbers and addresses, whose many target tokens all count; for facts with paraphrases,
`knowledge_neurons` asks for more. Cost: as knowledge neurons, over the texts' target tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locus.errors import InputError
from locus.model import Model
from locus.scores import NeuronScores
from tracing.checked_settings import checked_choices
from tracing.gradients.integrated_gradients import GradientEngineName, integrated_cost, integrated_gradients
from tracing.localizer import Cost, ExampleLoop, Examples, encode_facts
from tracing.localizers.knowledge_neurons import share_of_coarse


@dataclass(frozen=True)
@checked_choices
class PrivacyNeurons:
    """Neurons that carry the tokens of private texts."""

    PAPER_THRESHOLD: ClassVar[float] = 0.5
    """Scores above it are candidates of at least one text."""

    steps: int = 20
    """m, points of the integral."""
    threshold: float = 0.1
    """Share of a text's largest attribution that a candidate must reach."""
    engine: GradientEngineName = "auto"
    """How attributions are computed: one token at a time (exact), or whole forwards."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """A forward per target token, and single tokens through half of the blocks."""
        return integrated_cost(model, encode_facts(model, facts), self.steps)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Count the texts that each neuron is a candidate of; a retain set is not used.

        Raises:
            InputError: no texts, or a threshold outside (0, 1].
        """
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold {self.threshold}: a share of the largest, above 0 and at most 1")
        loop = ExampleLoop.of(model, facts, "its attribution")
        encoded = loop.encoded

        def of_text(number: int) -> tuple[Tensor, ...]:
            # integrated_gradients gives the mean over the target tokens; DEPN sums them
            summed = encoded[number].n_target * integrated_gradients(
                model, encoded[number], self.steps, engine=self.engine, batch_tokens=batch_tokens
            )
            return summed / len(encoded), share_of_coarse([summed], self.threshold)

        mean, count = loop.over_examples(of_text, "privacy neurons")
        values = count + 0.499 * mean / mean.abs().max().clamp(min=torch.finfo(mean.dtype).tiny)
        return NeuronScores(values.cpu(), "depn", model.fingerprint, model.atlas, asdict(self))
