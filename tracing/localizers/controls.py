"""Controls: localizers that know nothing of the target, to be run beside every claim.

    random           u, uniform in [0, 1]; with a layer profile, that many of each layer come first
    random-layers    u + 1 in a few layers drawn at random
    largest-norm     ||v||, v the neuron's value vector
    all-neurons      1

Use them always: a located mask is worth its trouble only where it beats random masks of the same size, and of the
same layer profile; published evidence goes both ways (Hase et al. 2023, arXiv:2301.04213; Guo et al. 2024,
arXiv:2410.12949). Cost: nothing, no forward and no backward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.model import Model
from locus.scores import NeuronScores
from tracing.localizer import Cost, Examples
from tracing.localizers.activation_norm import down_norms


def _uniform(model: Model, seed: int, skipped: int = 0) -> Float[Tensor, "layer neuron"]:
    """Uniform scores; `skipped` draws before them keep two controls of one seed apart."""
    generator = torch.Generator().manual_seed(seed)
    torch.rand(skipped, generator=generator)
    return torch.rand(model.atlas.n_layers, model.atlas.d_mlp, generator=generator)


@dataclass(frozen=True)
class RandomNeurons:
    """Neurons drawn at random; with a profile, the same number in each layer as a located mask has."""

    seed: int = 0
    """Same seed, same neurons."""
    profile: tuple[int, ...] = ()
    """Neurons per layer, e.g. a mask's `neurons_per_layer`; the top sum(profile) neurons then have just this
    profile. Empty: uniform over the model."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """Free."""
        return Cost()

    def run(
        self,
        model: Model,
        facts: Examples = (),
        retain: Examples | None = None,
        *,
        batch_tokens: int = 0,
    ) -> NeuronScores:
        """Draw the scores; the facts are not looked at.

        Raises:
            InputError: the profile does not fit the model.
        """
        values = _uniform(model, self.seed)
        atlas = model.atlas
        if self.profile:
            if (
                len(self.profile) != atlas.n_layers
                or max(self.profile) > atlas.d_mlp
                or min(self.profile) < 0
            ):
                raise InputError(
                    f"layer profile {list(self.profile)} does not fit {model.name}: give {atlas.n_layers} "
                    f"counts between 0 and {atlas.d_mlp}"
                )
            for layer, count in enumerate(self.profile):
                values[layer, values[layer].topk(count).indices] += 1.0
        return NeuronScores(values, "random", model.fingerprint, atlas, asdict(self))


@dataclass(frozen=True)
class RandomLayers:
    """All neurons of a few layers drawn at random come first."""

    n_layers: int = 1
    """How many layers are drawn."""
    seed: int = 0
    """Same seed, same layers."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """Free."""
        return Cost()

    def run(
        self,
        model: Model,
        facts: Examples = (),
        retain: Examples | None = None,
        *,
        batch_tokens: int = 0,
    ) -> NeuronScores:
        """Draw the layers; the facts are not looked at.

        Raises:
            InputError: more layers than the model has.
        """
        if not 1 <= self.n_layers <= model.atlas.n_layers:
            raise InputError(
                f"n_layers is {self.n_layers} and {model.name} has {model.atlas.n_layers} layers: "
                f"give 1 to {model.atlas.n_layers}"
            )
        values = _uniform(model, self.seed, model.atlas.n_layers * model.atlas.d_mlp)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(model.atlas.n_layers, generator=generator)[: self.n_layers]
        values[drawn] += 1.0
        return NeuronScores(values, "random-layers", model.fingerprint, model.atlas, asdict(self))


@dataclass(frozen=True)
class LargestNorm:
    """The neurons with the largest value vector: what writes most, whatever it writes."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """Free."""
        return Cost()

    def run(
        self,
        model: Model,
        facts: Examples = (),
        retain: Examples | None = None,
        *,
        batch_tokens: int = 0,
    ) -> NeuronScores:
        """Read the norms; the facts are not looked at."""
        return NeuronScores(
            down_norms(model).cpu(), "largest-norm", model.fingerprint, model.atlas, asdict(self)
        )


@dataclass(frozen=True)
class AllNeurons:
    """Every neuron alike: with a budget of 100 % the mask is all MLPs, the ceiling of what neurons can do."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """Free."""
        return Cost()

    def run(
        self,
        model: Model,
        facts: Examples = (),
        retain: Examples | None = None,
        *,
        batch_tokens: int = 0,
    ) -> NeuronScores:
        """Score every neuron 1; the facts are not looked at."""
        values = torch.ones(model.atlas.n_layers, model.atlas.d_mlp)
        return NeuronScores(values, "all-neurons", model.fingerprint, model.atlas, asdict(self))
