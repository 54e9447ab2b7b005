"""Edits of whole located neurons, in one stroke: switched off, turned round, put to their mean, or turned away.

A neuron that many facts use takes them all along: how much of what else is lost, the dose curve shows
(`editors.dose`). `editors.neuron_selective` changes what neurons write for the forget facts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from editors.dose import Direction, dosed
from editors.located import down_projections
from editors.neuron_parts import Part, located_parts
from editors.result import settings_of
from editors.statistics import mean_keys
from editors.training import generator
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from locus.tokens import encode
from locus.weights import stored

Log = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class NeuronZero:
    """Scale located neurons: strength 1 switches them off, 2 turns their sign round, −1 doubles them.

    Knowledge neurons are suppressed at 1 and amplified at −1 (Dai et al. 2022, arXiv:2104.08696), DEPN erases
    values at 1 (Wu et al. 2023, arXiv:2310.20138).
    """

    part: Part = "values"
    """values: what the neurons write; keys: what they answer to; both."""
    strength: float = 1.0
    """Weights are multiplied with 1 − strength."""
    goal: float = 0.0
    """Take the smallest strength that brings the facts' mean probability to this; 0 for all of it."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

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
        """Scale them; facts and text are looked at only for a goal. Memory ends bit for bit as it was.

        Raises:
            InputError: a mask of another model or without such weights, a wrong neuron, or a goal without facts.
        """
        selections = located_parts(model, mask, self.part, self.neurons)
        steps = {name: -_stored(model, name, chosen) for name, chosen in selections.items()}
        return dosed(
            model,
            Direction(selections, steps),
            mask,
            strength=self.strength,
            goal=self.goal,
            forget=forget,
            retain=retain,
            text=text,
            provenance={"editor": settings_of(self)},
            log=log,
        )


@dataclass(frozen=True)
class NeuronFlip:
    """Turn the sign of what located neurons write, w to −w."""

    part: Part = "values"
    """values: what the neurons write; keys: what they answer to; both."""
    goal: float = 0.0
    """Take the smallest part of the way to −w that brings the facts' mean probability to this; 0 for all of it."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

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
        """As `NeuronZero` of strength 2."""
        zero = NeuronZero(self.part, 2.0, self.goal, self.neurons)
        return zero.run(model, forget, retain, mask, text=text, folder=folder, resume=resume, log=log)


@dataclass(frozen=True)
class NeuronMean:
    """Mean ablation: located neurons write nothing, the layer's output bias what they wrote on average.

    Exactly the layer with each neuron's activation put to its mean over text. Needs an output bias that is in the
    mask; Llama, Gemma and their kin have none.
    """

    strength: float = 1.0
    """Share of the way to the mean."""
    goal: float = 0.0
    """Take the smallest strength that brings the facts' mean probability to this; 0 for all of it."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

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
        """Ablate them; `text`, by default locus' neutral one, gives the means.

        Raises:
            InputError: see `NeuronZero.run`; or a layer without an output bias, or with one that is not in the mask.
        """
        selections = located_parts(model, mask, "values", self.neurons)
        steps = {name: -_stored(model, name, chosen) for name, chosen in selections.items()}
        touched = [one for one in down_projections(model, mask) if one.param in selections]
        means = mean_keys(model, [one.layer for one in touched], text or neutral_text())
        for one in touched:
            bias = one.param.removesuffix("weight") + "bias"
            held = mask.entries.get(bias)
            if held is None or held.kind != "all":
                raise InputError(
                    f"{bias}: mean ablation puts what the neurons wrote on average there, but "
                    + (
                        "the mask does not hold all of it"
                        if _has(model, bias)
                        else "the model has no such bias"
                    )
                    + ": add it to the mask, or use neuron-selective"
                )
            update = torch.zeros(selections[one.param].shape, dtype=torch.float64)
            selections[one.param].put_(update, steps[one.param].double())
            lost = -(update.mT if one.transposed else update) @ means[one.layer]
            selections[bias], steps[bias] = held, lost
        return dosed(
            model,
            Direction(selections, steps),
            mask,
            strength=self.strength,
            goal=self.goal,
            forget=forget,
            retain=retain,
            text=text,
            provenance={"editor": settings_of(self)},
            log=log,
        )


Away = Literal["unknown", "alternatives", "noise"]


@dataclass(frozen=True)
class NeuronDirection:
    """Turn what located neurons write from the targets towards something else, or blur it.

    Knowledge neurons' update (Dai et al. 2022, arXiv:2104.08696): each value loses the direction of the facts'
    targets in the unembedding and gains another one's, here as unit vectors in units of the value's own norm, so
    that it means the same in every model. Or Gaussian noise on the values (as in Hong et al. 2024,
    arXiv:2406.11614, for concept vectors).
    """

    towards: Away = "unknown"
    """unknown: the direction of `word`; alternatives: of the facts' wrong targets; noise: a random one each."""
    word: str = " unknown"
    """The word for "unknown"."""
    old: float = 2.0
    """How much of the targets' direction is taken away, in norms of the value."""
    new: float = 2.0
    """How much of the other direction is added, in norms of the value."""
    strength: float = 1.0
    """Share of both."""
    goal: float = 0.0
    """Take the smallest strength that brings the facts' mean probability to this; 0 for all of it."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.towards not in get_args(Away):
            raise InputError(f"towards = {self.towards!r}: not one of {', '.join(get_args(Away))}")

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
        """Turn them; memory ends bit for bit as it was.

        Raises:
            InputError: see `NeuronZero.run`; no facts; or facts without alternatives where these are wanted.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        selections = located_parts(model, mask, "values", self.neurons)
        source = generator(self.seed, "noise", 0)
        steps = {}
        for one in down_projections(model, mask):
            if one.param not in selections:
                continue
            full = torch.zeros(selections[one.param].shape, dtype=torch.float64)
            selections[one.param].put_(full, _stored(model, one.param, selections[one.param]).double())
            values = full.mT if one.transposed else full
            turn = self._turn(model, forget, values, source) * values.norm(dim=0)
            steps[one.param] = selections[one.param].take(one.stored_as(turn).contiguous())
        return dosed(
            model,
            Direction({name: selections[name] for name in steps}, steps),
            mask,
            strength=self.strength,
            goal=self.goal,
            forget=forget,
            retain=retain,
            text=text,
            provenance={"editor": settings_of(self)},
            log=log,
        )

    def _turn(
        self,
        model: Model,
        forget: Sequence[Fact],
        values: Float[Tensor, "d_model neuron"],
        source: torch.Generator,
    ) -> Float[Tensor, "d_model neuron"]:
        """What is added to each value, in units of its norm."""
        if self.towards == "noise":
            drawn = torch.randn(values.shape, generator=source, dtype=torch.float64)
            noise: Tensor = self.new * drawn / drawn.norm(dim=0)
            return noise
        targets = [fact.target for fact in forget]
        if self.towards == "alternatives":
            others = [word for fact in forget for word in fact.alternatives]
            if not others:
                raise InputError("none of the facts has alternatives: add some, or turn towards unknown")
        else:
            others = [self.word]
        turn: Tensor = self.new * _direction(model, forget, others) - self.old * _direction(
            model, forget, targets
        )
        return turn[:, None].expand_as(values)


def _direction(model: Model, forget: Sequence[Fact], words: Sequence[str]) -> Float[Tensor, " d_model"]:
    """Unit vector of the mean of the unembedding rows of what these words begin with after a prompt."""
    head = model.module.get_parameter(f"{model.atlas.unembed}.weight").detach()
    prompt = forget[0].prompt
    firsts = [encode(model, Fact(id="word", prompt=prompt, target=word)).target_ids[0] for word in words]
    mean = head[firsts].double().cpu().mean(0)
    unit: Tensor = mean / mean.norm()
    return unit


def _stored(model: Model, name: str, chosen: Selection) -> Tensor:
    """The selected entries as the checkpoint holds them, in float32 or wider."""
    old = chosen.take(stored(model).read(name))
    return old.to(torch.promote_types(old.dtype, torch.float32))


def _has(model: Model, name: str) -> bool:
    return any(name == known for known, _ in model.module.named_parameters())
