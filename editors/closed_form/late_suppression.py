"""Late suppression: where a text asks for the fact, late MLPs write the answer off; where it asks for another, nothing.

Early edits (ROME, MEMIT, AlphaEdit at the subject's last token) cannot know which of the subject's relations will be
asked. In late layers the last position knows both subject and relation, so an edit there can tell them apart. The
price: the answer is still in the layers below, where a lens finds it and relearning brings it back. It is kept from
being said, not erased; `locus audit` shows both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import Log
from editors.key_value.asking_places import AskingPlace, asking_places, banned_probs, later_places
from editors.key_value.down_projections import (
    DownProjection,
    add_,
    borrowed,
    chosen_layers,
    delta_of,
    down_projections,
    whole_projections,
)
from editors.key_value.held_texts import HeldClass, HeldText, about_peers, held_moments, held_prompts
from editors.key_value.key_positions import states
from editors.key_value.least_squares import SecondMomentMetric, least_squares_update, within
from editors.key_value.residual_spread import before_norm
from editors.key_value.residual_target import suppressing_deltas
from locus import progress
from locus.delta import WeightDelta
from locus.elicitation.elicit import Elicitation, Elicited, elicit, not_found
from locus.errors import InputError
from locus.fact import Fact, neutral_text, trainable_facts
from locus.grid import Grid, cell_of, filled, side_of
from locus.mask import WeightMask
from locus.model import Model
from locus.target_forms import first_tokens
from locus.tokens import encode, encode_text

WEIGHTS = {"text": 1.0, "peers": 1.0, "subject": 1.0, "retain": 2.0, "asked of peers": 2.0}
"""Of each kind of held text against the others."""


@dataclass(frozen=True)
class LateSuppression:
    """Regularized least squares on the places that ask, in late down projections, round after round.

    For every place j that asks a fact, δ_j is the smallest change found of the final residual after which no form of
    the target has more probability than `goal`, towards what the model says there without the target. Each of the n
    chosen layers then takes its share:

        ΔW = argmin Σ_j ‖ΔW k_j − δ_j / n‖² + weight · J · E‖ΔW k‖²

    with J places and the expectation over held texts. Places that still say it get a new δ in the next round, which is
    iterated Tikhonov regularization: directions that tell the places apart from held texts are written first. This
    method is ours; it has no paper. As weight → ∞ nothing changes; as weight → 0 with independent keys every layer
    writes its share exactly.
    """

    layers: tuple[int, ...] = ()
    """Layers to edit, negative from the end; none for those of the mask between `first` and `last`."""
    first: float = 0.6
    """Where no layers are named: depth at which the edit begins, as a share of all layers."""
    last: float = 0.94
    """Depth at which it ends."""
    goal: float = 0.003
    """Probability that all forms of a target together may keep at a place that asks."""
    step: float = 0.01
    """Length of a step of the search for δ, as a share of the residual's norm."""
    steps: int = 60
    """Steps of that search, at most."""
    weight: float = 10.0
    """Weight of what must stay, λ."""
    ridge: float = 1e-4
    """Added to the diagonal of the held second moment, as a share of its mean."""
    rounds: int = 6
    """Rounds, at most."""
    forgotten: float = 0.1
    """The rounds end when no place gives its target's forms more probability than this."""
    look_ahead: int = 9
    """Tokens that the edited model writes behind each place after the first round, to find where it says the target
    later; 0 for none."""
    ways: int = 8
    """Ways of asking for each fact, at most, beside its own prompt."""
    peers: int = 4
    """Peers that each place and each text of a subject is held with."""
    hold_tokens: int = 6000
    """Held positions of each kind of text, at most."""
    elicitation: Elicitation = field(default_factory=Elicitation)
    """What the model is asked about each fact beforehand."""
    seed: int = 0
    """Seed of the division of ways and subjects between the edit and the judge, and of the choice of held texts."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def __post_init__(self) -> None:
        for name in ("goal", "step", "steps", "weight", "rounds", "hold_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} = {getattr(self, name)}: must be positive")
        if not 0 <= self.first <= self.last <= 1:
            raise InputError(f"first = {self.first}, last = {self.last}: 0 <= first <= last <= 1 is needed")

    def own_mask(self, model: Model) -> WeightMask:
        """The down projections of the layers that are edited: what may change where no mask is given."""
        return whole_projections(model, self.layers or self._default_layers(model))

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
        log: Log | None = None,
    ) -> WeightDelta:
        """Ask the model about the facts, then write; the model in memory ends bit for bit as it was.

        `text` is held unchanged, by default the neutral text that comes with locus. `folder` and `resume` are not
        needed: what the model was asked is kept in locus' cache.

        Raises:
            InputError: no facts, a mask without down projections among the layers, or a fact that cannot be encoded.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        located = self._located(model, mask)
        found = elicit(model, forget, self.elicitation)
        ways = edit_ways(forget, retain, found, self.seed, self.ways)
        places = asking_places(model, forget, ways)
        classes = held_classes(model, forget, retain, text, found, ways, self)
        moments, held = held_moments(
            model, [one.layer for one in located], classes, self.hold_tokens, self.seed, self.batch_tokens
        )
        if not any(held.values()):
            raise InputError("no text to hold the model by: give text, retain facts, or let it write some")
        metrics = {
            one.layer: SecondMomentMetric.of(within(moments[one.layer], one.neurons), self.ridge)
            for one in located
        }
        updates = {one.param: (one, torch.zeros(one.allowed.shape, dtype=torch.float64)) for one in located}
        with borrowed(model, updates):
            rounds = self._write_(model, forget, places, located, metrics, updates, log)
        about = {
            "editor": settings_of(self),
            "layers": [one.layer for one in located],
            "ways": {fact.id: len(ways.get(fact.id, ())) for fact in forget},
            "held": held,
            "rounds": rounds,
            "not found": not_found(forget, found),
        }
        return delta_of(model, updates, mask, about)

    def _write_(
        self,
        model: Model,
        forget: Sequence[Fact],
        places: Sequence[AskingPlace],
        located: Sequence[DownProjection],
        metrics: Mapping[int, SecondMomentMetric],
        updates: Mapping[str, tuple[DownProjection, Float[Tensor, "d_model neuron"]]],
        log: Log | None,
    ) -> list[dict[str, Any]]:
        """All rounds, in the borrowed weights; what was written is added to `updates`."""
        places, said = list(places), list[dict[str, Any]]()
        before, last = float("inf"), dict[str, Tensor]()
        with progress.task("late suppression", total=self.rounds) as line:
            for number in range(self.rounds + 1):
                probs = banned_probs(model, places, self.batch_tokens)
                mean, most = float(probs.mean()), float(probs.max())
                if (
                    mean > before
                ):  # the layers' shares do not add up here: the round did harm and is taken back
                    for name, update in last.items():
                        add_(model, updates[name][0], -update)
                        updates[name][1].sub_(update)
                    said[-1]["taken back"] = True
                    break
                said.append({"places": len(places), "mean": mean, "max": most})
                if number == self.rounds or (number > 1 and most < self.forgotten):
                    break
                if number == 1 and self.look_ahead:
                    places += later_places(model, places, forget, self.look_ahead, self.forgotten)
                    mean = float(banned_probs(model, places, self.batch_tokens).mean())
                last, before = self._round_(model, places, located, metrics), mean
                for name, update in last.items():
                    updates[name][1].add_(update)
                line.advance(note=f"p {mean:.3f}, at most {most:.3f}")
                if log is not None:
                    log({"round": number, **said[-1]})
        return said

    def _round_(
        self,
        model: Model,
        places: Sequence[AskingPlace],
        located: Sequence[DownProjection],
        metrics: Mapping[int, SecondMomentMetric],
    ) -> dict[str, Float[Tensor, "d_model neuron"]]:
        """One round: δ of every place, and each layer's share of it, added to the weight; the updates by its name."""
        rows = [one.row for one in places]
        names = {one.layer: model.atlas.neuron_in[one.layer] for one in located}
        final = model.atlas.final_norm
        read, _ = states(model, rows, inputs=[*names.values(), final], batch_tokens=self.batch_tokens)
        banned = [one.banned for one in places]
        deltas = suppressing_deltas(model, read[final], banned, self.goal, self.step, self.steps)
        shares = {
            one.layer: before_norm(model, one.layer, rows, deltas / len(located), self.batch_tokens)
            for one in located
        }
        written = {}
        for one in located:
            keys = read[names[one.layer]][:, one.neurons].mT
            update = one.spread(
                least_squares_update(
                    metrics[one.layer], keys, shares[one.layer].mT, self.weight * len(places)
                )
            )
            add_(model, one, update)
            written[one.param] = update
        return written

    def _located(self, model: Model, mask: WeightMask) -> list[DownProjection]:
        """The layers to edit, of those that the mask holds.

        Raises:
            InputError: it holds none of them.
        """
        every = down_projections(model, mask)
        if self.layers:
            return chosen_layers(every, model.atlas.n_layers, self.layers, len(every))
        wanted = set(self._default_layers(model))
        found = [one for one in every if one.layer in wanted]
        if not found:
            raise InputError(
                f"the mask holds no down projection of layers {min(wanted)} to {max(wanted)}, where this edit is made: "
                "locate neurons there, name other --layers, or leave the mask out"
            )
        return found

    def _default_layers(self, model: Model) -> tuple[int, ...]:
        n = model.atlas.n_layers
        return tuple(range(min(n - 1, round(self.first * n)), min(n - 1, round(self.last * n)) + 1))


def edit_ways(
    forget: Sequence[Fact], retain: Sequence[Fact], found: Mapping[str, Elicited], seed: int, most: int
) -> dict[str, tuple[str, ...]]:
    """By fact: prompts in other ways that are the edit's, those first behind which the model answers most surely.

    Args:
        forget: Facts to forget.
        retain: Facts to keep.
        found: What the model said about the former.
        seed: Seed of the grid's division of ways.
        most: Prompts of each fact, at most.
    """
    grid = Grid.of(forget, trainable_facts(retain), seed)
    chosen = {}
    for fact in forget:
        cell = cell_of(fact)
        ways = [way.prompt for way in found[fact.id].ways]
        if cell is not None:
            mine = grid.with_ways({cell: ways}).ways(cell, "edit")
            allowed = {filled(template, cell.subject) for template in mine}
            ways = [way for way in ways if way in allowed]
        else:
            ways = [way for way in ways if side_of(seed, "way", fact.id, way) == "edit"]
        chosen[fact.id] = tuple(ways[:most])
    return chosen


def held_classes(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    text: Sequence[str],
    found: Mapping[str, Elicited],
    ways: Mapping[str, Sequence[str]],
    editor: LateSuppression,
) -> list[HeldClass]:
    """All that the edit must leave as it is, by kind: see `WEIGHTS`.

    Args:
        model: Its tokenizer is used.
        forget: Facts to forget.
        retain: Facts to keep; those held out are not looked at.
        text: Neutral paragraphs; none for those that come with locus.
        found: What the model said about the facts to forget.
        ways: Prompts that ask them.
        editor: Its `peers` and `seed`.
    """
    choice = random.Random(editor.seed)
    kept = trainable_facts(retain)
    gone = {fact.subject for fact in forget}
    banned: dict[str, tuple[int, ...]] = {}
    for fact in forget:
        if fact.subject is not None:
            mine = banned.get(fact.subject, ())
            banned[fact.subject] = tuple(dict.fromkeys((*mine, *first_tokens(model.tokenizer, fact.target))))
    own: dict[HeldText, None] = {}
    beside: dict[HeldText, None] = {}
    asked: dict[str, None] = {}
    for fact in forget:
        if fact.subject is None:
            continue
        near = [
            one.subject for one in kept if one.subject and fact.relation and one.relation == fact.relation
        ]
        listed = [name for name in found[fact.id].peers if side_of(editor.seed, "subject", name) == "edit"]
        peers = [name for name in dict.fromkeys((*near, *listed)) if name not in gone]
        texts = found[fact.id].texts
        own |= dict.fromkeys(HeldText(ids, banned=banned[fact.subject]) for ids in texts)
        written = [str(model.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in texts]
        for other in about_peers(written, fact.subject, peers, 1, choice):
            beside |= {held: None for held in held_prompts(model, [other], whole=True)}
        prompts = (fact.prompt, *ways.get(fact.id, ()))
        asked |= dict.fromkeys(about_peers(prompts, fact.subject, peers, editor.peers, choice))
    texts_of = {
        "text": [
            HeldText(one.ids) for paragraph in text or neutral_text() for one in encode_text(model, paragraph)
        ],
        "peers": list(beside),
        "subject": list(own),
        "retain": [HeldText(encode(model, fact).ids) for fact in kept],
        "asked of peers": held_prompts(model, list(asked)),
    }
    return [HeldClass(name, texts, WEIGHTS[name]) for name, texts in texts_of.items()]
