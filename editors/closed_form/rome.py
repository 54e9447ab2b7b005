"""ROME: one layer, one rank-one update a fact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.key_value.distractors import facts_for
from editors.key_value.down_projections import (
    DownProjection,
    add_,
    borrowed,
    chosen_layers,
    delta_of,
    down_projections,
    refuse_edited,
    whole_projections,
)
from editors.key_value.edit_target import EditTarget
from editors.key_value.key_positions import Place, context_prefixes, retain_moments, rows, states
from editors.key_value.least_squares import SecondMomentMetric, least_squares_update, within
from editors.key_value.second_moments import second_moments
from editors.key_value.shared_keys import by_key
from editors.key_value.target_value import ValueDeltas, find_value_deltas
from locus import progress
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text
from locus.mask import WeightMask
from locus.model import Model


@dataclass(frozen=True)
class ROME:
    """Rank-one model editing (Meng et al. 2022, arXiv:2202.05262): one fact after the other, in one layer.

    The value v* that makes the model give the wanted answer is written to the fact's key k by the cheapest update D
    with D k = v* − W k, cheapest in E‖D k‖² over text. Facts after the first leave the keys of those before them
    exactly where they are, so a sequence does not undo itself; all of them together are EMMET's equality-
    constrained update (Gupta et al. 2024, arXiv:2403.14236). Facts that share a key, as facts of one subject in like
    words do, are edited as one: a single value that minimizes the losses of all of them. Where the mask holds only
    some neurons of the layer, keys and metric are those of these neurons and the equations hold as they are.
    """

    layer: int | None = None
    """The layer to edit, negative from the end; None for the mask's, of several the one nearest to a fifth of
    the depth among those with the most located weights."""
    target: EditTarget = EditTarget(prob_stop=0.02)
    """What the model should say instead, and how its value is found."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in the second moment."""
    ridge: float = 1e-3
    """Added to the second moment's diagonal, as a share of its mean."""
    moment_tokens: int = 100_000
    """Tokens of text that the second moment is taken over, at most."""
    place: Place = "subject"
    """Edit at the last token of the subject or of the prompt."""
    seed: int = 0
    """Seed of everything random: the context prefixes, and the wrong answers that are drawn."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def rewriting_to(self, answer: str) -> ROME:
        """The same edit with `answer` as every fact's new target."""
        return replace(self, target=self.target.rewriting_to(answer))

    def own_mask(self, model: Model) -> WeightMask:
        """The down projections of the layers named, or of all: what may change where no mask is given."""
        return whole_projections(model, () if self.layer is None else (self.layer,))

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
        """Edit the facts one key after the other; the model in memory ends bit for bit as it was.

        Keys of retain facts that are not held out count in the second moment. `text` is what the rest of it and
        the context prefixes are taken from, by default the neutral text that comes with locus. The text's second moment
        is cached; `folder` and `resume` are not needed.

        Raises:
            InputError: no facts, a mask without down projections, a fact without a subject, or two facts whose
                keys depend on each other.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        forget = facts_for(model, self.target, forget, retain, self.seed)
        text = text or neutral_text()
        wanted = () if self.layer is None else (self.layer,)
        located = chosen_layers(down_projections(model, mask), model.atlas.n_layers, wanted, 1)[0]
        refuse_edited(model, [located.param])
        moment = second_moments(
            model, [located.layer], text, n_tokens=self.moment_tokens, batch_tokens=self.batch_tokens
        )[located.layer]
        prefixes = context_prefixes(text, self.target.prefixes, self.seed)
        kept = retain_moments(
            model, retain, [located.layer], prefixes, self.place, self.retain_weight, self.batch_tokens
        )[located.layer]
        metric = SecondMomentMetric.of(within(moment.mean + kept, located.neurons), self.ridge)
        memory = _Memory(metric, located)
        with borrowed(model, [located.param]):
            groups = by_key(model, forget, located.layer, prefixes, self.place, self.batch_tokens)
            for group in progress.track(groups, "edit"):
                key, found = self._look(model, group, located, prefixes)
                add_(model, located, memory.learn(key, found.delta[0]))
                for number, fact in enumerate(group):
                    memory.losses[fact.id] = float(found.loss[number])
                    if log is not None:
                        log(memory.record(fact, number, found))
        provenance = {
            "editor": settings_of(self),
            "layer": located.layer,
            "moment_tokens": moment.n_tokens,
            "ridge": metric.ridge,
            "condition": metric.condition,
            "losses": memory.losses,
            "cost": metric.cost(memory.total[:, located.neurons]),
        }
        return delta_of(model, {located.param: (located, memory.total)}, mask, provenance)

    def _look(
        self, model: Model, group: Sequence[Fact], located: DownProjection, prefixes: Sequence[str]
    ) -> tuple[Float[Tensor, " neuron"], ValueDeltas]:
        """The key that some facts share at the layer, averaged over context prefixes, and its value delta."""
        site = model.atlas.neuron_in[located.layer]
        seen = rows(model, group, prefixes, self.place)
        keys = states(model, seen, inputs=[site], batch_tokens=self.batch_tokens)[0][site]
        found = find_value_deltas(model, [group], self.target, site, prefixes, self.place, self.batch_tokens)
        return keys.mean(0), found


class _Memory:
    """What has been written so far: keys that later facts must leave alone, and the sum of the updates."""

    def __init__(self, metric: SecondMomentMetric, located: DownProjection) -> None:
        self.metric, self.located = metric, located
        self.keys = torch.zeros(len(metric.matrix), 0, dtype=torch.float64)
        self.total = torch.zeros(located.allowed.shape, dtype=torch.float64)
        self.losses: dict[str, float] = {}

    def learn(
        self, key: Float[Tensor, " neuron"], residual: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "d_model neuron"]:
        """The update of one more fact, which moves none of the earlier keys."""
        self.keys = torch.cat([self.keys, key[self.located.neurons, None]], dim=1)
        wanted = torch.zeros(len(residual), self.keys.shape[1], dtype=torch.float64)
        wanted[:, -1] = residual
        update = self.located.spread(least_squares_update(self.metric, self.keys, wanted))
        self.total += update
        return update

    def record(self, fact: Fact, number: int, found: ValueDeltas) -> dict[str, Any]:
        """The record for the log of fact `number` of those that share a key."""
        return {
            "fact": fact.id,
            "loss": self.losses[fact.id],
            "prob": float(found.prob[number]),
            "steps": found.steps,
            "from_prefix": found.from_prefix,
            "value_delta": float(found.delta.norm()),
            "value": float(found.start.norm()),
            "norm": float(self.total.norm()),
        }
