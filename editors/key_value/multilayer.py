"""Edits of many facts at once, spread over several layers: what MEMIT, AlphaEdit and LaW do around their own solve."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import Log
from editors.key_value.distractors import facts_for
from editors.key_value.down_projections import (
    DownProjection,
    borrowed,
    chosen_layers,
    delta_of,
    down_projections,
    refuse_edited,
    whole_projections,
)
from editors.key_value.edit_target import EditTarget, judged_per_token
from editors.key_value.key_positions import Place, context_prefixes, retain_moments
from editors.key_value.least_squares import within
from editors.key_value.residual_spread import ResidualSpread
from editors.key_value.second_moments import second_moments
from editors.key_value.shared_keys import by_key
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text
from locus.forward import measure
from locus.mask import WeightMask
from locus.model import Model

Solve = Callable[[DownProjection, Tensor, Tensor], Tensor]
"""A layer, the facts' keys `n key` and residuals `d_model key` -> the update `d_model n` of its n located neurons."""


@dataclass(frozen=True)
class MultilayerEdit(ABC):
    """What edits of many facts over several layers have in common; each adds how it solves for a layer's update."""

    layers: tuple[int, ...] = ()
    """Layers to edit, negative from the end; none for `most` of the mask's, nearest to a fifth of the depth."""
    most: int = 5
    """How many layers at most, where none are named."""
    target: EditTarget = EditTarget(to="alternatives", lr=0.1, clamp=0.75)
    """What the model should say instead, and how the state that makes it say so is found."""
    rounds: int = 3
    """How often a fact is written at most: what the model still says after a round is written again."""
    forgotten: float = 0.01
    """A fact whose target has no more probability than this counts as forgotten and is not written again. A target of
    more than eight tokens is judged by the token: see `target.sentence_stop`."""
    batch: int = 0
    """Facts edited at once, more where they share a key; 0 for all."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in the second moment."""
    moment_tokens: int = 100_000
    """Tokens of text that the second moment is taken over, at most."""
    place: Place = "subject"
    """Edit at the last token of the subject or of the prompt."""
    seed: int = 0
    """Seed of everything random: the context prefixes, and the wrong answers that are drawn."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def rewriting_to(self, answer: str) -> MultilayerEdit:
        """The same edit with `answer` as every fact's new target."""
        return replace(self, target=self.target.rewriting_to(answer))

    def own_mask(self, model: Model) -> WeightMask:
        """The down projections of the layers named, or of all: what may change where no mask is given."""
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
        log: Log | None = None,
    ) -> WeightDelta:
        """Edit the facts, batch after batch; the model in memory ends bit for bit as it was.

        Keys of retain facts that are not held out count in the second moment; `text` is what the rest of it and the
        context prefixes are taken from, by default the neutral text that comes with locus. `folder` and `resume` are
        not needed.

        Raises:
            InputError: no facts, a mask without down projections, a fact without a subject, or what `solver` says.
        """
        forget = facts_for(model, self.target, forget, retain, self.seed)
        spread = MultilayerWriter.over(self, model, forget, retain, mask, text)
        solve, about = self.solver(spread)
        with spread.borrowed():
            spread.write_(forget, solve, log)
        return spread.delta(mask, **about)

    @abstractmethod
    def solver(self, spread: MultilayerWriter) -> tuple[Solve, dict[str, Any]]:
        """How a layer's update is solved for, and what the delta's provenance says of it."""


@dataclass(frozen=True, eq=False)
class MultilayerWriter:
    """Where such an edit writes, what must stay, and what it has written so far."""

    editor: MultilayerEdit
    model: Model
    located: Sequence[DownProjection]
    prefixes: Sequence[str]
    """Context prefixes that keys and values are averaged over."""
    moments: Mapping[int, Float[Tensor, "n n"]]
    """By layer: second moment of the located neurons over text and retain facts."""
    n_tokens: int
    """Tokens of text that these were taken over."""
    written: Written

    @classmethod
    def over(
        cls,
        editor: MultilayerEdit,
        model: Model,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        mask: WeightMask,
        text: Sequence[str],
    ) -> MultilayerWriter:
        """Choose the layers and measure what must stay; nothing is written yet.

        Raises:
            InputError: no facts, or a mask without down projections.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        text = text or neutral_text()
        located = chosen_layers(
            down_projections(model, mask), model.atlas.n_layers, editor.layers, max(1, editor.most)
        )
        refuse_edited(model, [one.param for one in located])
        layers = [one.layer for one in located]
        prefixes = context_prefixes(text, editor.target.prefixes, editor.seed)
        moments = second_moments(
            model, layers, text, n_tokens=editor.moment_tokens, batch_tokens=editor.batch_tokens
        )
        kept = retain_moments(
            model, retain, layers, prefixes, editor.place, editor.retain_weight, editor.batch_tokens
        )
        return cls(
            editor,
            model,
            located,
            prefixes,
            {one.layer: within(moments[one.layer].mean + kept[one.layer], one.neurons) for one in located},
            moments[layers[0]].n_tokens,
            Written(located),
        )

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """The weights it writes into; inside, `write_` changes them, and after it they are as they were."""
        with borrowed(self.model, self.written.updates):
            yield

    def write_(self, facts: Sequence[Fact], solve: Solve, log: Log | None) -> None:
        """Edit the facts in the borrowed weights, batch after batch.

        A fact that is not forgotten after a round is searched for and written again, and with it those that share its
        key, up to `rounds` times in all.
        """
        editor = self.editor
        top = self.located[-1].layer
        groups = by_key(self.model, facts, top, self.prefixes, editor.place, editor.batch_tokens)
        limits = self._limits(facts)
        for batch in batches_of(groups, editor.batch):
            left = list(batch)
            remaining: list[str] = []
            for _ in range(editor.rounds):
                self._write_once_(left, solve, log)
                remaining = self._remaining([fact for group in left for fact in group], limits)
                left = [group for group in left if any(fact.id in remaining for fact in group)]
                if not left:
                    break
            self.written.about["remaining"] += remaining

    def _limits(self, facts: Sequence[Fact]) -> dict[str, float]:
        """Probability at which each fact counts as forgotten: of the target, or per token of a sentence-long one."""
        before = measure(self.model, facts, self.editor.batch_tokens)
        per_token = self.editor.target.sentence_stop * (-before.nll / before.n_tokens).exp()
        return {
            fact.id: float(share) if judged_per_token(int(n)) else self.editor.forgotten
            for fact, share, n in zip(facts, per_token, before.n_tokens, strict=True)
        }

    def _remaining(self, facts: Sequence[Fact], limits: Mapping[str, float]) -> list[str]:
        """Ids of the facts that the model still gives more probability than their limits."""
        now = measure(self.model, facts, self.editor.batch_tokens)
        per_token = (-now.nll / now.n_tokens).exp().tolist()
        return [
            fact.id
            for fact, whole, token, n in zip(facts, now.prob.tolist(), per_token, now.n_tokens, strict=True)
            if (token if judged_per_token(int(n)) else whole) > limits[fact.id]
        ]

    def _write_once_(self, groups: Sequence[Sequence[Fact]], solve: Solve, log: Log | None) -> None:
        """Find what the facts should become, then write it layer after layer."""
        self.written.release(groups)
        ramp = ResidualSpread.find(
            self.model,
            groups,
            self.located,
            self.editor.target,
            self.prefixes,
            self.editor.place,
            self.editor.batch_tokens,
        )
        ramp.write_(solve, self.written.keep)
        self.written.done(groups, ramp, log)

    def delta(self, mask: WeightMask, **about: Any) -> WeightDelta:
        """All that was written, and how it went."""
        provenance = {
            "editor": settings_of(self.editor),
            "layers": [one.layer for one in self.located],
            "moment_tokens": self.n_tokens,
            **about,
            **self.written.about,
        }
        return delta_of(self.model, self.written.updates, mask, provenance)


class Written:
    """What has been written so far, layer by layer: keys of earlier facts, and the sums of the updates."""

    def __init__(self, located: Sequence[DownProjection]) -> None:
        self.updates = {
            one.param: (one, torch.zeros(one.allowed.shape, dtype=torch.float64)) for one in located
        }
        self._earlier: dict[int, dict[str, Tensor]] = {one.layer: {} for one in located}
        self._fresh: list[tuple[int, Tensor]] = []
        self.about: dict[str, Any] = {
            "losses": {},
            "missing": {},
            "rounds": {},
            "remaining": [],
            "from_prefix": True,
        }

    def earlier(self, one: DownProjection) -> Float[Tensor, "n key"]:
        """A layer's keys of the facts written before, which are to stay where they are."""
        found = list(self._earlier[one.layer].values())
        return torch.stack(found, 1) if found else torch.zeros(len(one.neurons), 0, dtype=torch.float64)

    def with_earlier(
        self,
        one: DownProjection,
        keys: Float[Tensor, "n fresh"],
        residual: Float[Tensor, "d_model fresh"],
    ) -> tuple[Float[Tensor, "n key"], Float[Tensor, "d_model key"]]:
        """Keys and residuals with those of earlier facts, which are to stay where they are, in front."""
        earlier = self.earlier(one)
        still = residual.new_zeros(len(residual), earlier.shape[1])
        return torch.cat([earlier, keys], dim=1), torch.cat([still, residual], dim=1)

    def release(self, groups: Sequence[Sequence[Fact]]) -> None:
        """Let the keys of facts that are written again move."""
        for keys in self._earlier.values():
            for group in groups:
                keys.pop(group[0].id, None)

    def keep(
        self, one: DownProjection, keys: Float[Tensor, "n key"], update: Float[Tensor, "d_model neuron"]
    ) -> None:
        """Note one layer's keys and update."""
        self._fresh.append((one.layer, keys))
        self.updates[one.param][1].add_(update)

    def done(self, groups: Sequence[Sequence[Fact]], ramp: ResidualSpread, log: Log | None) -> None:
        """Note what was written: its keys are from now on those of earlier facts."""
        for layer, keys in self._fresh:
            self._earlier[layer] |= dict(zip((group[0].id for group in groups), keys.unbind(1), strict=True))
        self._fresh.clear()
        self.about["from_prefix"] &= ramp.found.from_prefix
        missing = ramp.missing().norm(dim=1) / ramp.found.delta.norm(dim=1).clamp_min(1e-12)
        facts = [(fact, left) for group, left in zip(groups, missing.tolist(), strict=True) for fact in group]
        for (fact, left), loss in zip(facts, ramp.found.loss.tolist(), strict=True):
            self.about["losses"][fact.id], self.about["missing"][fact.id] = loss, left
            self.about["rounds"][fact.id] = self.about["rounds"].get(fact.id, 0) + 1
            if log is not None:
                log({"fact": fact.id, "loss": loss, "missing": left, "steps": ramp.found.steps})


def batches_of(groups: Sequence[Sequence[Fact]], size: int) -> list[list[Sequence[Fact]]]:
    """Groups of facts in order, `size` facts at a time; 0 for all at once. A group is never divided."""
    batches: list[list[Sequence[Fact]]] = []
    room = 0
    for group in groups:
        if not batches or (size and len(group) > room):
            batches.append([])
            room = size
        batches[-1].append(group)
        room -= len(group)
    return batches
