"""Protocols of the training loop: an objective, and what else it may define."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from locus.fact import Example, Fact
from locus.model import Model
from locus.tokens import Encoded


@runtime_checkable
class Trains(Protocol):
    """An editor that runs the training loop, once or in stages."""

    @property
    def training(self) -> Training:
        """The training settings; of several stages, those of the last."""


@runtime_checkable
class TrainsInStages(Trains, Protocol):
    """An editor that runs the training loop with objectives of its own."""

    def largest_stage(self) -> Objective:
        """An objective with the forwards of the stage that takes most memory."""


@runtime_checkable
class Objective(Trains, Protocol):
    """An editor that the training loop trains: a loss on forget examples, and settings."""

    @property
    def retain(self) -> Retain:
        """The retain term."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """The loss to lower on a batch of forget examples: a mean over its examples."""


@runtime_checkable
class Steers(Protocol):
    """An objective that steers the output of one block; the hidden-state retain term then holds that block."""

    def steered_layer(self, n_layers: int) -> int:
        """Number of the block, in a model of `n_layers`."""


@runtime_checkable
class Answering(Protocol):
    """An objective that also looks at another answer to each prompt."""

    def answer(self, fact: Fact, pool: Sequence[Fact], step: int) -> Example:
        """The fact's prompt with that answer; `pool` are all facts that may be looked at."""


@runtime_checkable
class Finishing(Protocol):
    """An objective with a stopping rule of its own, asked at each check after `min_steps`."""

    def done(self, model: Model, forget: Sequence[Encoded]) -> bool:
        """Whether the forget examples are forgotten by its own measure."""


def retain_loss(objective: Objective, kept: Prediction) -> Float[Tensor, ""]:
    """The objective's retain term on one batch of facts or text, unweighted."""
    n_layers = kept.model.atlas.n_layers
    steered = objective.steered_layer(n_layers) if isinstance(objective, Steers) else None
    return objective.retain.loss(kept, steered)
