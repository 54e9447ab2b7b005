"""What an edit is given, and what an editor can do: a capability is a Protocol here, never a `hasattr`.

Everything in `editors.EDITORS` is an `Editor`. Some also choose their own mask, can be told the new answer, or train:
`ChoosesMask` and `Rewrites` are here, `Objective`, `Trains` and `TrainsInStages` beside the training loop
(`editors.training.objective`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from locus.delta import WeightDelta
from locus.fact import Fact, trainable_facts
from locus.mask import WeightMask
from locus.model import Model
from locus.parallel.ranks import ALONE, Ranks

Log = Callable[[Mapping[str, Any]], None]
"""Called with one record per step, of JSON values."""


@dataclass(frozen=True)
class EditData:
    """The facts and texts of one edit."""

    forget: Sequence[Fact]
    """Facts to forget. Their paraphrases and neighbours are never trained on."""
    retain: Sequence[Fact] = ()
    """Facts to keep, those held out for the audit among them."""
    text: Sequence[str] = ()
    """Neutral paragraphs."""

    @property
    def trainable_retain(self) -> list[Fact]:
        """The retain facts that may be trained on: those not held out."""
        return trainable_facts(self.retain)


@dataclass(frozen=True)
class EditRun:
    """How one run of an edit is saved, resumed, reported and shared."""

    folder: Path | None = None
    """Folder for resumable states; None saves none."""
    resume: bool = False
    """Whether to go on from the state in `folder`, if there is one."""
    log: Log | None = None
    """Called after every step."""
    ranks: Ranks = ALONE
    """The processes that share every step."""


@runtime_checkable
class Editor(Protocol):
    """A method that changes located weights."""

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
        """Edit; the model in memory ends bit for bit as it was.

        Args:
            model: The base.
            forget: Facts to forget.
            retain: Facts to keep.
            mask: The weights that may change.
            text: Neutral paragraphs.
            folder: Folder for resumable states.
            resume: Whether to go on from the state in `folder`.
            log: Called with one record per step.
        """


@runtime_checkable
class ChoosesMask(Protocol):
    """An editor that names the weights it may change when no mask is given."""

    def own_mask(self, model: Model) -> WeightMask:
        """Those weights of `model`."""


@runtime_checkable
class ListsNeurons(ChoosesMask, Protocol):
    """An editor whose own mask is that of the neurons it lists, if it lists any."""

    @property
    def neurons(self) -> tuple[str, ...]:
        """Neurons as "layer:neuron"."""


@runtime_checkable
class Deterministic(Protocol):
    """A method that may declare that every seed gives the same result."""

    deterministic: ClassVar[bool]
    """Whether nothing is drawn at random."""


@runtime_checkable
class Rewrites(Protocol):
    """An editor that can be told what the model should answer instead."""

    def rewriting_to(self, answer: str) -> Editor:
        """The same edit with `answer` as every fact's new target."""
