"""What the papers on knowledge neurons and on privacy neurons do with the neurons they locate, as presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from editors.deltas import settings_of
from editors.key_value.neuron_parts import neuron_mask
from editors.neurons.neuron_edits import NeuronDirection, NeuronZero
from editors.strength import StrengthSearch
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model

Recipe = Literal["suppress", "enhance", "erase", "update"]


@dataclass(frozen=True)
class KnowledgeNeuronRecipe(StrengthSearch):
    """Knowledge neurons' own edits (Dai et al. 2022): suppress, enhance, erase or update what they write.

    suppress and enhance put the activation to 0 and to twice itself, which for the weights is the value vector times
    0 or 2 (arXiv:2104.08696); erase turns the values towards the word for "unknown"; update turns them from the
    target to the fact's first alternative. Locate with `--method knowledge-neurons --parts down`.
    """

    deterministic: ClassVar[bool] = True
    """Nothing is drawn at random: every seed gives the same edit."""
    recipe: Recipe = "suppress"
    """suppress: values times 0; enhance: times 2; erase: values towards "unknown"; update: from target to
    alternative, the first of each fact."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe not in get_args(Recipe):
            raise InputError(f"recipe = {self.recipe!r}: not one of {', '.join(get_args(Recipe))}")

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
        """As `NeuronZero` of strength 1 or −1, or `NeuronDirection` towards unknown or the alternatives.

        Raises:
            InputError: see there.
        """
        if self.recipe == "update":
            forget = [replace(fact, alternatives=fact.alternatives[:1]) for fact in forget]
        delta = self._plain().run(
            model, forget, retain, mask, text=text, folder=folder, resume=resume, log=log
        )
        return replace(delta, provenance={**delta.provenance, "editor": settings_of(self)})

    def _plain(self) -> NeuronZero | NeuronDirection:
        same = _shared(self)
        if self.recipe in ("suppress", "enhance"):
            factor = 1.0 if self.recipe == "suppress" else -1.0
            return NeuronZero(strength=factor, **same)
        towards: Literal["unknown", "alternatives"] = "unknown" if self.recipe == "erase" else "alternatives"
        return NeuronDirection(towards=towards, **same)


@dataclass(frozen=True)
class PrivacyNeuronRecipe(StrengthSearch):
    """DEPN's own edit (Wu et al. 2023): the value vectors of privacy neurons put to zero.

    The paper erases the 20 or so neurons that most private texts share (arXiv:2310.20138): locate with
    `--method depn --budget 20 --parts down`.
    """

    deterministic: ClassVar[bool] = True
    """Nothing is drawn at random: every seed gives the same edit."""
    neurons: tuple[str, ...] = ()
    """Only these of the mask's neurons, as layer:neuron."""

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
        """As `NeuronZero` of strength 1.

        Raises:
            InputError: see there.
        """
        zero = NeuronZero(**_shared(self))
        delta = zero.run(model, forget, retain, mask, text=text, folder=folder, resume=resume, log=log)
        return replace(delta, provenance={**delta.provenance, "editor": settings_of(self)})


def _shared(recipe: KnowledgeNeuronRecipe | PrivacyNeuronRecipe) -> dict[str, Any]:
    """The fields that a recipe hands on to the edit it is made of."""
    return {
        "neurons": recipe.neurons,
        "strength_goal": recipe.strength_goal,
        "strength_curve": recipe.strength_curve,
    }
