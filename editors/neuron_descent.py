"""Take what located neurons write down the targets' log-probability, in one closed form and without a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from editors.dose import Direction, Dose, dosed
from editors.least_squares import Metric, within
from editors.located import DownProjection
from editors.neuron_parts import located_values, neuron_mask
from editors.result import settings_of
from editors.statistics import second_moments
from editors.subject import Row, behind, openings, row
from editors.value_slopes import Slopes, value_slopes
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text
from locus.mask import WeightMask
from locus.model import Model

Where = Literal["subject", "prompt", "after", "all"]


@dataclass(frozen=True)
class NeuronDescent:
    """The cheapest change of what located neurons write that takes the same from every target's log-probability.

    With G the gradient of a fact's log-probability with respect to the values W of a layer's located neurons, the
    update D minimizes Σ tr(D C Dᵀ) over layers (the mean squared change of what the layers write over text) subject
    to Σ ⟨G, D⟩ = −1 nat for every forget fact and 0 for every retain fact. That is D = Σ a_f G_f C⁻¹ with as many
    unknowns as there are facts. A neuron is not switched off: it writes otherwise where its layer sees the facts.
    """

    where: Where = "after"
    """Positions that G is summed over: the last token of the subject, the last of the prompt, all from the one to
    the other, or every token."""
    strength: float = 12.0
    """Nats, to first order, that each target loses."""
    dose: Dose = Dose()
    """How the strength is chosen and looked at."""
    prefixes: int = 2
    """Random openings before every forget prompt, besides the prompt itself."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in C."""
    slack: float = 0.01
    """Added to the diagonal of the facts' equations, as a share of its mean: 0 meets them exactly."""
    ridge: float = 0.01
    """Added to C's diagonal, as a share of its mean."""
    moment_tokens: int = 100_000
    """Tokens of text that C is taken over, at most."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""
    seed: int = 0
    """Of the openings."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def __post_init__(self) -> None:
        if self.where not in get_args(Where):
            raise InputError(f"where = {self.where!r}: not one of {', '.join(get_args(Where))}")
        if min(self.retain_weight, self.slack) < 0:
            raise InputError("retain_weight and slack must not be negative")

    def own_mask(self, model: Model) -> WeightMask:
        """The values of the neurons listed: what may change where no mask is given."""
        return neuron_mask(model, self.neurons, "values")

    def run(
        self,
        model: Model,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        mask: WeightMask,
        *,
        text: Sequence[str] = (),
        folder: Path | None = None,
        resume: bool = False,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> WeightDelta:
        """Change the values; memory ends bit for bit as it was.

        Retain facts that are not held out keep their log-probability to first order, and count in C.

        Raises:
            InputError: no facts, a mask without values of neurons, or a fact without a subject where one is needed.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        text = text or neutral_text()
        located = located_values(model, mask, self.neurons)
        layers = [one.layer for one in located]
        moments = second_moments(
            model, layers, text, n_tokens=self.moment_tokens, batch_tokens=self.batch_tokens
        )
        slopes = self._slopes(model, forget, [fact for fact in retain if not fact.held_out], layers, text)
        kept = slopes.owner >= len(forget)
        metrics = {}
        for one in located:
            moment = within(moments[one.layer].mean, one.neurons)
            others = slopes.keys[one.layer][kept][:, one.neurons]
            if len(others):
                moment = moment + self.retain_weight * others.mT @ others / len(others)
            metrics[one.layer] = Metric.of(moment, self.ridge)
        wanted = torch.zeros(int(slopes.owner.max()) + 1, dtype=torch.float64)
        wanted[: len(forget)] = -1.0
        updates = cheapest(slopes, located, metrics, wanted, self.slack)
        steps = {
            one.param: one.selection.take(one.stored_as(one.spread(updates[one.layer])).contiguous())
            for one in located
        }
        return dosed(
            model,
            Direction({one.param: one.selection for one in located}, steps),
            mask,
            strength=self.strength,
            dose=self.dose,
            forget=forget,
            retain=retain,
            text=text,
            provenance={
                "editor": settings_of(self),
                "layers": layers,
                "conditions": [metrics[layer].condition for layer in layers],
                "costs": [metrics[layer].cost(updates[layer]) for layer in layers],
            },
            log=log,
        )

    def _slopes(
        self,
        model: Model,
        forget: Sequence[Fact],
        kept: Sequence[Fact],
        layers: Sequence[int],
        text: Sequence[str],
    ) -> Slopes:
        """Gradients of the forget facts behind every opening, mean over them, then of the retain facts."""
        prefixes = ("", *openings(text, self.prefixes, self.seed))
        rows = [
            self._row(model, behind(fact, prefix), number)
            for number, fact in enumerate(forget)
            for prefix in prefixes
        ]
        rows += [self._row(model, fact, number) for number, fact in enumerate(kept, len(forget))]
        found = value_slopes(model, rows, layers, self._counted, self.batch_tokens)
        share = torch.where(found.owner < len(forget), 1.0 / len(prefixes), 1.0)[:, None]
        pulls = {layer: pull * share for layer, pull in found.pulls.items()}
        return Slopes(found.keys, pulls, found.owner, found.logprob)

    def _row(self, model: Model, fact: Fact, number: int) -> Row:
        needs_subject = self.where in ("subject", "after")
        return row(model, fact, number, "subject" if needs_subject and fact.subject else "prompt")

    def _counted(self, one: Row) -> range:
        last = one.encoded.target_start - 1
        if self.where == "all":
            return range(len(one.encoded.ids) - 1)
        if self.where == "after":
            return range(one.position, last + 1)
        return range(one.position, one.position + 1)


def cheapest(
    slopes: Slopes,
    located: Sequence[DownProjection],
    metrics: Mapping[int, Metric],
    wanted: Float[Tensor, " fact"],
    slack: float = 0.0,
) -> dict[int, Float[Tensor, "d_model n"]]:
    """The update of every layer's located values that changes each fact's log-probability by `wanted`, at least cost.

    With slack = 0: the minimum of Σ tr(D C Dᵀ) subject to Σ ⟨G_f, D⟩ = wanted_f, which is D = Σ a_f G_f C⁻¹ with
    M a = wanted and M_fh = Σ ⟨G_f C⁻¹, G_h⟩, sums over layers.
    """
    n_facts = len(wanted)
    belongs = torch.nn.functional.one_hot(slopes.owner, n_facts).double()
    gram = torch.zeros(n_facts, n_facts, dtype=torch.float64)
    solved = {}
    for one in located:
        keys, pulls = slopes.keys[one.layer][:, one.neurons], slopes.pulls[one.layer]
        solved[one.layer] = metrics[one.layer].solve(keys.mT)
        gram += belongs.mT @ ((pulls @ pulls.mT) * (keys @ solved[one.layer])) @ belongs
    gram += slack * gram.diagonal().mean() * torch.eye(n_facts, dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise InputError(
            "the located neurons cannot tell the facts apart (their gradients depend on each other): "
            "locate more neurons, or allow for slack"
        )
    shares = torch.cholesky_solve(wanted[:, None], factor).flatten()[slopes.owner]
    return {
        one.layer: (slopes.pulls[one.layer] * shares[:, None]).mT @ solved[one.layer].mT for one in located
    }
