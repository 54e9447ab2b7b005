"""Who's Harry Potter: fine-tune on what a model that never knew would say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import EditData, EditRun, Log
from editors.training.finetune import finetune, train
from editors.training.prediction import Prediction
from editors.training.retain import Retain
from editors.training.settings import Training
from editors.two_stage.anchored_terms import Anchors, Translation
from editors.two_stage.reinforcement import REINFORCING, Reinforce
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import batches, label_logits
from locus.mask import WeightMask
from locus.metrics import token_nll
from locus.model import Model
from locus.tokens import Encoded, encode

NO_LABEL = -1
"""Stands for "this token is not trained on"."""
_MOST_BYTES = 1 << 30
"""Logits that are held at once while the targets are made."""


def generic_logits(
    base: Float[Tensor, "*label d_vocab"], reinforced: Float[Tensor, "*label d_vocab"], alpha: float
) -> Float[Tensor, "*label d_vocab"]:
    """v_base - alpha * relu(v_reinforced - v_base) (Eldan & Russinovich 2023, arXiv:2310.02238, equation 1).

    What reinforcement raised is lowered; the rest stays as it was. With alpha = 0 it is the base.
    """
    return base - alpha * (reinforced - base).relu()


@dataclass(frozen=True)
class GenericTargets:
    """Fine-tuning on cached labels, one for each target token of each forget example."""

    labels: tuple[tuple[int, ...], ...]
    """Example -> label of each target token; `NO_LABEL` where none is trained."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit."""
    training: Training = Training()
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """Cross-entropy to the cached labels: a mean over each example's labels, then over examples."""
        flat = [label for number in forget.batch.examples for label in self.labels[number]]
        labels = torch.tensor(flat, device=forget.logits.device)
        trained = (labels != NO_LABEL).to(forget.logits)
        loss = token_nll(forget.logits, labels.clamp(min=0)) * trained
        return (forget.example_mean(loss) / forget.example_mean(trained).clamp(min=1e-9)).mean()

    run = finetune


@dataclass(frozen=True)
class WHP:
    """The whole method as a weight edit: reinforce, combine generic targets once, fine-tune on them."""

    alpha: float = 5.0
    """How strongly what reinforcement raised is lowered."""
    anchors: tuple[str, ...] = ()
    """Idiosyncratic terms and their generic counterparts, each as "Hogwarts=Mystic Academy"."""
    reinforce: Training = REINFORCING
    """How the reinforced model is trained, within the mask."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit; the paper has none."""
    training: Training = Training()
    """How the located weights are trained on the generic targets."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise InputError(f"alpha = {self.alpha}: must not be negative")
        if self.training.reworded:
            raise InputError(
                "reworded: the generic targets of WHP belong to the text as it is; leave it at 0"
            )
        Anchors.read(self.anchors)

    def largest_stage(self) -> Reinforce:
        """The last stage, with the targets in place of the generic labels: as many, so the same forwards."""
        return Reinforce(self.retain, self.training)

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
        """Reinforce, make the targets, fine-tune.

        Args:
            model: The model to edit.
            forget: Facts to forget.
            retain: Facts to keep.
            mask: The weights that may move.
            text: Neutral paragraphs for the retain term.
            folder: Folder for resumable states; None saves none.
            resume: Whether to go on from the state in `folder`, if there is one.
            log: Called with one record per step of the fine-tuning.
        """
        first = None if folder is None else folder / "reinforce"
        learner = Reinforce(training=self.reinforce)
        reinforced = train(learner, model, EditData(forget), mask, EditRun(first, resume))
        labels = self.targets(model, forget, reinforced)
        objective = GenericTargets(labels, self.retain, self.training)
        delta = train(objective, model, EditData(forget, retain, text), mask, EditRun(folder, resume, log))
        about = {**delta.provenance, "editor": settings_of(self), "labels": [list(row) for row in labels]}
        return dataclasses.replace(delta, provenance=about)

    @torch.no_grad()
    def targets(
        self, model: Model, forget: Sequence[Fact], reinforced: WeightDelta
    ) -> tuple[tuple[int, ...], ...]:
        """The generic label of every target token.

        The base reads the text with every anchor replaced by its counterpart, the reinforced model the text as it
        is; their logits are combined where a token of one begins at the same place as a token of the other. A
        token without such a partner, and an anchor that the same text had before, is not trained on. The first
        tokens of counterparts of anchors seen before are lowered by `alpha` too.
        """
        anchors = Anchors.read(self.anchors)
        originals = [encode(model, fact) for fact in forget]
        translations = [anchors.translate(model, one) for one in originals]
        rows: list[tuple[int, ...]] = []
        for group in _groups(originals, translations, model.atlas.d_vocab):
            base = _logits(model, [translations[i].encoded for i in group])
            with reinforced.applied(model):
                raised = _logits(model, [originals[i] for i in group])
            rows += [
                self._labels(originals[i], translations[i], *logits)
                for i, *logits in zip(group, base, raised, strict=True)
            ]
        return tuple(rows)

    def _labels(
        self,
        one: Encoded,
        translated: Translation,
        base: Float[Tensor, "translated d_vocab"],
        raised: Float[Tensor, "pos d_vocab"],
    ) -> tuple[int, ...]:
        labels = []
        for position in range(one.target_start, len(one.ids)):
            partner = translated.partner[position]
            if partner is None or position in translated.repeated:
                labels.append(NO_LABEL)
                continue
            generic = generic_logits(base[partner - 1], raised[position - 1], self.alpha)
            generic[translated.counterparts_before(position)] -= self.alpha
            labels.append(int(generic.argmax()))
        return tuple(labels)


def _groups(
    originals: Sequence[Encoded], translations: Sequence[Translation], d_vocab: int
) -> Iterator[list[int]]:
    """Examples, in order, whose logits under both models fit `_MOST_BYTES` together (one at least)."""
    group: list[int] = []
    used = 0
    for i, (one, translated) in enumerate(zip(originals, translations, strict=True)):
        needed = 4 * d_vocab * (len(one.ids) + len(translated.encoded.ids))
        if group and used + needed > _MOST_BYTES:
            yield group
            group, used = [], 0
        group.append(i)
        used += needed
    yield group


def _logits(model: Model, encoded: Sequence[Encoded]) -> list[Float[Tensor, "pos d_vocab"]]:
    """Next-token logits at every position but the last, for each sequence."""
    whole = [Encoded(one.ids, 1, None, one.tokens) for one in encoded]
    found: list[Tensor] = [torch.empty(0)] * len(whole)
    for batch in batches(whole):
        logits = label_logits(model, batch).cpu()
        for number in batch.examples:
            found[number] = logits[batch.example == number]
    return found
