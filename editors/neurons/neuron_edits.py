"""Edits of whole located neurons, in one stroke: switched off, turned round, put to their mean, or turned away.

A neuron that many facts use takes them all along: how much of what else is lost, the strength curve shows
(`editors.strength`). `editors.neurons.neuron_selective` changes what neurons write for the forget facts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import EditData, Log
from editors.key_value.down_projections import DownProjection
from editors.key_value.least_squares import SecondMomentMetric, within
from editors.key_value.neuron_parts import Part, located_parts, located_values, neuron_mask
from editors.key_value.second_moments import mean_keys, second_moments
from editors.refusals import REFUSALS
from editors.strength import Direction, StrengthSearch, delta_at_strength
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from locus.random_streams import generator
from locus.selection import Selection
from locus.tokens import encode
from locus.weight_source import stored


@dataclass(frozen=True)
class NeuronZero(StrengthSearch):
    """Scale located neurons: strength 1 switches them off, 2 turns their sign round, −1 doubles them.

    Knowledge neurons are suppressed at 1 and amplified at −1 (Dai et al. 2022, arXiv:2104.08696), DEPN erases
    values at 1 (Wu et al. 2023, arXiv:2310.20138).
    """

    deterministic: ClassVar[bool] = True
    """Nothing is drawn at random: every seed gives the same edit."""
    part: Part = "values"
    """values: what the neurons write; keys: what they answer to; both."""
    strength: float = 1.0
    """Weights are multiplied with 1 − strength."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

    def own_mask(self, model: Model) -> WeightMask:
        """The weights of the neurons listed: what may change where no mask is given."""
        return neuron_mask(model, self.neurons, self.part)

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
        steps = {name: -old for name, old in _stored(model, selections).items()}
        return delta_at_strength(
            model,
            Direction(selections, steps),
            mask,
            self.strength,
            self,
            EditData(forget, retain, text),
            provenance={"editor": settings_of(self)},
            log=log,
        )


@dataclass(frozen=True)
class NeuronFlip(StrengthSearch):
    """Turn the sign of what located neurons write, w to −w."""

    deterministic: ClassVar[bool] = True
    """Nothing is drawn at random: every seed gives the same edit."""
    part: Part = "values"
    """values: what the neurons write; keys: what they answer to; both."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

    def own_mask(self, model: Model) -> WeightMask:
        """The weights of the neurons listed: what may change where no mask is given."""
        return neuron_mask(model, self.neurons, self.part)

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
        zero = NeuronZero(
            strength_goal=self.strength_goal,
            strength_curve=self.strength_curve,
            part=self.part,
            strength=2.0,
            neurons=self.neurons,
        )
        return zero.run(model, forget, retain, mask, text=text, folder=folder, resume=resume, log=log)


@dataclass(frozen=True)
class NeuronMean(StrengthSearch):
    """Mean ablation: located neurons write nothing but what all of them together wrote on average.

    Where the layer has an output bias that is in the mask, the mean goes there: exactly the layer with each neuron's
    activation put to its mean over text. Llama, Gemma and their kin have no such bias. There the mean is written by
    the located neurons themselves, each in proportion to its weight in the best linear prediction of the constant 1
    from their activations, a = C⁻¹ E[k]: W becomes (W E[k]) aᵀ. How constant that is, "constant" in the provenance
    says (E[k]ᵀ a, at most 1): few neurons make a poor bias.
    """

    deterministic: ClassVar[bool] = True
    """Nothing is drawn at random: every seed gives the same edit."""
    strength: float = 1.0
    """Share of the way to the mean."""
    ridge: float = 1e-3
    """Added to C's diagonal, as a share of its mean; only where there is no output bias."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

    def own_mask(self, model: Model) -> WeightMask:
        """The weights of the neurons listed: what may change where no mask is given."""
        return neuron_mask(model, self.neurons, "values") | _output_biases(model, self.neurons)

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
            InputError: see `NeuronZero.run`; or a layer with an output bias that is not in the mask.
        """
        located = located_values(model, mask, self.neurons)
        text = text or neutral_text()
        layers = [one.layer for one in located]
        means = mean_keys(model, layers, text)
        selections = {one.param: one.selection for one in located}
        steps = {name: -old for name, old in _stored(model, selections).items()}
        biased = {one.param: _output_bias(model, mask, one) for one in located}
        moments = second_moments(model, [one.layer for one in located if biased[one.param] is None], text)
        constant = {}
        for one in located:
            mean = means[one.layer][one.neurons]
            lost = one.weight(model)[:, one.neurons] @ mean
            held = biased[one.param]
            if held is not None:
                selections[held[0]], steps[held[0]] = held[1], lost
                continue
            metric = SecondMomentMetric.of(within(moments[one.layer].mean, one.neurons), self.ridge)
            share = metric.solve(mean[:, None]).flatten()
            constant[one.layer] = float(mean @ share)
            instead = one.spread(lost[:, None] * share)
            steps[one.param] = steps[one.param] + one.selection.take(one.stored_as(instead).contiguous())
        return delta_at_strength(
            model,
            Direction(selections, steps),
            mask,
            self.strength,
            self,
            EditData(forget, retain, text),
            provenance={"editor": settings_of(self), "constant": constant},
            log=log,
        )


Away = Literal["unknown", "refusal", "alternatives", "noise"]


@dataclass(frozen=True)
class NeuronDirection(StrengthSearch):
    """Turn what located neurons write from the targets towards something else, or blur it.

    Knowledge neurons' update (Dai et al. 2022, arXiv:2104.08696): each value loses the direction of the facts'
    targets in the unembedding and gains another one's, here as unit vectors in units of the value's own norm, so
    that it means the same in every model. Or Gaussian noise on the values (as in Hong et al. 2024,
    arXiv:2406.11614, for concept vectors).
    """

    towards: Away = "unknown"
    """unknown: the direction of `word`; refusal: of what refusals begin with; alternatives: of the facts' wrong
    targets; noise: a random one each."""
    word: str = " unknown"
    """The word for "unknown"."""
    old: float = 2.0
    """How much of the targets' direction is taken away, in norms of the value."""
    new: float = 2.0
    """How much of the other direction is added, in norms of the value."""
    strength: float = 1.0
    """Share of both."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""
    seed: int = 0
    """Seed of the noise."""

    def own_mask(self, model: Model) -> WeightMask:
        """The weights of the neurons listed: what may change where no mask is given."""
        return neuron_mask(model, self.neurons, "values")

    def __post_init__(self) -> None:
        super().__post_init__()
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
        located = located_values(model, mask, self.neurons)
        source = generator(self.seed, "noise", 0)
        steps = {}
        for one in located:
            values = torch.where(one.allowed, one.weight(model), 0.0)
            turn = self._turn(model, forget, values, source) * values.norm(dim=0)
            steps[one.param] = one.selection.take(one.stored_as(turn).contiguous())
        return delta_at_strength(
            model,
            Direction({one.param: one.selection for one in located}, steps),
            mask,
            self.strength,
            self,
            EditData(forget, retain, text),
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
            others = [self.word] if self.towards == "unknown" else list(REFUSALS)
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


def _stored(model: Model, selections: Mapping[str, Selection]) -> dict[str, Tensor]:
    """The selected entries as the checkpoint holds them, in float32 or wider."""
    base = stored(model)
    taken = {name: chosen.take(base.read(name)) for name, chosen in selections.items()}
    return {name: old.to(torch.promote_types(old.dtype, torch.float32)) for name, old in taken.items()}


def _output_bias(model: Model, mask: WeightMask, one: DownProjection) -> tuple[str, Selection] | None:
    """The bias of a down projection and all of its entries; None where the model has none.

    Raises:
        InputError: the model has one and the mask does not hold all of it.
    """
    bias = one.param.removesuffix("weight") + "bias"
    if bias not in shapes_of(model.module):
        return None
    held = mask.entries.get(bias)
    if held is None or held.kind != "all":
        raise InputError(
            f"{bias}: mean ablation puts what the neurons wrote on average there, but the mask does not hold all of "
            "it: add it to the mask, name the neurons with --neurons instead of a mask, or use neuron-selective"
        )
    return bias, held


def _output_biases(model: Model, neurons: Sequence[str]) -> WeightMask:
    """The output biases, where there are any, of the layers that have one of the listed neurons."""
    shapes = shapes_of(model.module)
    names = [name.removesuffix("weight") + "bias" for name in neuron_mask(model, neurons, "values").entries]
    return WeightMask.of_parameters([name for name in names if name in shapes], shapes, model.fingerprint)
