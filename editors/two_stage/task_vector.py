"""Task arithmetic: subtract from the weights what learning the forget set further would add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from editors.deltas import changed, settings_of
from editors.editor import EditData, EditRun, Log
from editors.training.finetune import train
from editors.training.settings import Training
from editors.two_stage.reinforcement import REINFORCING, Reinforce
from locus.delta import WeightDelta
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model


def negated(
    old: Float[Tensor, "..."], reinforced: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."]:
    """old - scale * (reinforced - old) (Ilharco et al. 2022, arXiv:2212.04089).

    With scale = 0 the old weights, with scale = -1 the reinforced ones.
    """
    return old - scale * (reinforced - old)


@dataclass(frozen=True)
class TaskVector:
    """Subtract the task vector of the forget set, restricted to the located weights."""

    scale: float = 1.0
    """How many times the vector is subtracted."""
    training: Training = REINFORCING
    """How the vector is learnt."""

    def largest_stage(self) -> Reinforce:
        """The only stage."""
        return Reinforce(training=self.training)

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
        """Reinforce the forget set within the mask, then go the other way.

        Args:
            model: The model to edit.
            forget: Facts to forget.
            retain: Not used.
            mask: The weights that may move.
            text: Not used.
            folder: Folder for resumable states; None saves none.
            resume: Whether to go on from the state in `folder`, if there is one.
            log: Called with one record per step of the reinforcement.
        """
        learnt = train(self.largest_stage(), model, EditData(forget), mask, EditRun(folder, resume, log))
        selections = {name: change.selection for name, change in learnt.changes.items()}

        def change(name: str, old: Tensor) -> Tensor:
            return negated(old, learnt.changes[name].new.to(old), self.scale)

        about = {**learnt.provenance, "editor": settings_of(self)}
        return changed(model, selections, change, mask, about)
