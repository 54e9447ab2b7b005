"""Take what located neurons write down the targets' log-probability, in one closed form and without a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import EditData
from editors.key_value.down_projections import (
    DownProjection,
    add_,
    borrowed,
    chosen_layers,
    whole_projections,
)
from editors.key_value.key_positions import KeyRow, context_prefixes, row, with_prefix
from editors.key_value.least_squares import SecondMomentMetric, within
from editors.key_value.neuron_parts import located_values, neuron_mask
from editors.key_value.second_moments import SecondMoment, second_moments
from editors.key_value.value_slopes import Slopes, value_slopes
from editors.strength import Direction, StrengthSearch, delta_at_strength
from locus import progress
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text, trainable_facts
from locus.mask import WeightMask
from locus.model import Model

Where = Literal["subject", "prompt", "after", "all"]


@dataclass(frozen=True)
class NeuronDescent(StrengthSearch):
    """Lower the targets' log-probability by the cheapest change of what located neurons write; nothing is searched for.

    With G the gradient of a fact's log-probability with respect to the values W of a layer's located neurons, the
    update D minimizes Σ tr(D C Dᵀ) over layers (the mean squared change of what the layers write over text) subject
    to Σ ⟨G, D⟩ = −δ for each forget fact and 0 for each retain fact, in nats. That is D = Σ a_f G_f C⁻¹ with as many
    unknowns as there are facts. δ takes a fact to the probability `prob_stop`, by at most `nats` per round; a fact that
    is there is held where it is. No neuron is switched off: it writes otherwise where its layer sees the facts.
    """

    where: Where = "subject"
    """Positions that G is summed over: the last token of the subject, the last of the prompt, all from the one to
    the other, or every token."""
    prob_stop: float = 0.002
    """Probability that each target is brought down to, to first order."""
    nats: float = 6.0
    """How much a target loses in one round, at most."""
    rounds: int = 1
    """Rounds at most, each with new gradients."""
    strength: float = 1.0
    """Share of the way."""
    prefixes: int = 2
    """Random context prefixes of every forget prompt; the prompt without one is always used too."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in C."""
    slack: float = 0.01
    """Added to the diagonal of the facts' equations, as a share of its mean: 0 meets them exactly."""
    ridge: float = 0.01
    """Added to C's diagonal, as a share of its mean."""
    moment_tokens: int = 100_000
    """Tokens of text that C is taken over, at most."""
    layers: tuple[int, ...] = ()
    """Only these of the mask's layers, negative from the end."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""
    seed: int = 0
    """Seed of the context prefixes."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where not in get_args(Where):
            raise InputError(f"where = {self.where!r}: not one of {', '.join(get_args(Where))}")
        if min(self.retain_weight, self.slack) < 0:
            raise InputError("retain_weight and slack must not be negative")
        if not (0 < self.prob_stop < 1 and self.nats > 0 and self.rounds > 0):
            raise InputError("prob_stop must be a probability between 0 and 1, nats and rounds positive")

    def own_mask(self, model: Model) -> WeightMask:
        """The values of the neurons listed, or else of all of the layers named: what may change without a mask."""
        if self.neurons:
            return neuron_mask(model, self.neurons, "values")
        return whole_projections(model, self.layers)

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
        if self.layers:
            located = chosen_layers(located, model.atlas.n_layers, self.layers, len(self.layers))
        kept = trainable_facts(retain)
        total, metrics, left = self._descend(model, forget, kept, located, text)
        steps = {
            one.param: one.selection.take(one.stored_as(one.spread(total[one.layer])).contiguous())
            for one in located
        }
        return delta_at_strength(
            model,
            Direction({one.param: one.selection for one in located}, steps),
            mask,
            self.strength,
            self,
            EditData(forget, retain, text),
            provenance={
                "editor": settings_of(self),
                "layers": [one.layer for one in located],
                "facts_by_round": left,
                "conditions": [metric.condition for metric in metrics.values()],
                "costs": [metric.cost(total[layer]) for layer, metric in metrics.items()],
            },
            log=log,
        )

    def _descend(
        self,
        model: Model,
        forget: Sequence[Fact],
        kept: Sequence[Fact],
        located: Sequence[DownProjection],
        text: Sequence[str],
    ) -> tuple[dict[int, Tensor], dict[int, SecondMomentMetric], list[int]]:
        """The sum of the rounds' updates by layer, the metrics they are cheapest in, and how many facts each moved."""
        layers = [one.layer for one in located]
        moments = second_moments(
            model, layers, text, n_tokens=self.moment_tokens, batch_tokens=self.batch_tokens
        )
        rows = self._rows(model, forget, kept, text)
        metrics: dict[int, SecondMomentMetric] = {}
        total = {
            one.layer: torch.zeros(model.atlas.d_model, len(one.neurons), dtype=torch.float64)
            for one in located
        }
        left: list[int] = []
        with borrowed(model, [one.param for one in located]):
            for _ in progress.track(range(self.rounds), "rounds"):
                slopes, prob = self._slopes(model, rows, len(forget), layers)
                wanted = torch.zeros(len(forget) + len(kept), dtype=torch.float64)
                wanted[: len(forget)] = -(prob / self.prob_stop).log().clamp(0, self.nats)
                left.append(int((wanted < 0).sum()))
                if not left[-1]:
                    break
                metrics = metrics or {
                    one.layer: self._metric(one, moments, slopes, len(forget)) for one in located
                }
                updates = cheapest(slopes, located, metrics, wanted, self.slack)
                for one in located:
                    allowed = one.spread(updates[one.layer])
                    add_(model, one, allowed)
                    total[one.layer] += allowed[:, one.neurons]
        return total, metrics, left

    def _rows(
        self, model: Model, forget: Sequence[Fact], kept: Sequence[Fact], text: Sequence[str]
    ) -> list[KeyRow]:
        """The forget facts after every context prefix, then the retain facts as they are."""
        prefixes = ("", *context_prefixes(text, self.prefixes, self.seed))
        rows = [
            self._row(model, with_prefix(fact, prefix), number)
            for number, fact in enumerate(forget)
            for prefix in prefixes
        ]
        return rows + [self._row(model, fact, number) for number, fact in enumerate(kept, len(forget))]

    def _slopes(
        self, model: Model, rows: Sequence[KeyRow], n_forget: int, layers: Sequence[int]
    ) -> tuple[Slopes, Float[Tensor, " fact"]]:
        """Means over a fact's context prefixes: the gradients, and the forget targets' probability (geometric)."""
        found = value_slopes(model, rows, layers, self._counted, self.batch_tokens)
        owner = torch.tensor([one.owner for one in rows])
        n_rows = torch.bincount(owner).double()
        pulls = {layer: pull / n_rows[found.owner][:, None] for layer, pull in found.pulls.items()}
        logprob = torch.zeros(len(n_rows), dtype=torch.float64).index_add(0, owner, found.logprob) / n_rows
        return Slopes(found.keys, pulls, found.owner, found.logprob), logprob[:n_forget].exp()

    def _metric(
        self, one: DownProjection, moments: Mapping[int, SecondMoment], slopes: Slopes, n_forget: int
    ) -> SecondMomentMetric:
        """C of a layer's located neurons: over text, and over the retain facts' keys."""
        moment = within(moments[one.layer].mean, one.neurons)
        others = slopes.keys[one.layer][slopes.owner >= n_forget][:, one.neurons]
        if len(others):
            moment = moment + self.retain_weight * others.mT @ others / len(others)
        return SecondMomentMetric.of(moment, self.ridge)

    def _row(self, model: Model, fact: Fact, number: int) -> KeyRow:
        needs_subject = self.where in ("subject", "after")
        return row(model, fact, number, "subject" if needs_subject and fact.subject else "prompt")

    def _counted(self, one: KeyRow) -> range:
        last = one.encoded.target_start - 1
        if self.where == "all":
            return range(len(one.encoded.ids) - 1)
        if self.where == "after":
            return range(one.position, last + 1)
        return range(one.position, one.position + 1)


def cheapest(
    slopes: Slopes,
    located: Sequence[DownProjection],
    metrics: Mapping[int, SecondMomentMetric],
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
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    if float(torch.linalg.eigvalsh(scale[:, None] * gram * scale)[0]) < 1e-10:
        raise InputError(
            "the located neurons cannot tell the facts apart (their gradients depend on each other): "
            "locate more neurons, or allow for slack"
        )
    shares = torch.linalg.solve(gram, wanted)[slopes.owner]
    return {
        one.layer: (slopes.pulls[one.layer] * shares[:, None]).mT @ solved[one.layer].mT for one in located
    }
