"""The data of a training run, and what each step sees of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editors.retain import Retain
from editors.training import Training, draw
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import Batch, TargetScores, batches, collate, measure
from locus.model import Model
from locus.tokens import Encoded, encode, encode_text

N_PROBE = 32
"""Retain facts looked at to see whether utility holds."""


@dataclass(frozen=True, eq=False)
class Data:
    """Encoded examples, and the base's scores of those that are judged against it."""

    facts: Sequence[Fact]
    """What must go."""
    kept_facts: Sequence[Fact]
    """Retain facts that may be trained on: those not held out."""
    forget: list[Encoded]
    retain: list[Encoded]
    texts: list[Encoded]
    reference: TargetScores
    """The base's scores of the forget examples."""
    probe: list[Encoded]
    """Retain facts that the base has right."""

    @classmethod
    def read(
        cls,
        model: Model,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        text: Sequence[str],
        term: Retain,
        training: Training,
    ) -> Data:
        """Encode everything and measure the reference; `model` must be the base as it is.

        Raises:
            InputError: nothing to forget, a retain term without data, or an example that cannot be encoded.
        """
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        kept = [fact for fact in retain if not fact.held_out]
        if term.active and not (kept and term.facts) and not (text and term.texts):
            raise InputError(
                f"the retain term {term.term} has no data: give retain facts that are not all held out, or text"
            )
        encoded = [encode(model, fact) for fact in forget]
        encoded_kept = [encode(model, fact) for fact in kept]
        probe = [encoded_kept[i] for i in draw(training.seed, "probe", 0, len(kept), N_PROBE)]
        if probe and training.utility:
            right = measure(model, probe, training.batch_tokens).correct.tolist()
            probe = [one for one, is_right in zip(probe, right, strict=True) if is_right]
        return cls(
            facts=forget,
            kept_facts=kept,
            forget=encoded,
            retain=encoded_kept,
            texts=[block for paragraph in text for block in encode_text(model, paragraph)],
            reference=measure(model, encoded, training.batch_tokens),
            probe=probe if training.utility else [],
        )

    def forget_batches(self, training: Training, step: int) -> Iterator[Batch]:
        """This step's forget examples; `Batch.examples` are numbers in `forget`."""
        chosen = draw(training.seed, "forget", step, len(self.forget), training.forget_per_step)
        return _batches(self.forget, chosen, training.batch_tokens)

    def retain_batches(self, term: Retain, training: Training, step: int) -> Iterator[Batch]:
        """This step's retain facts."""
        chosen = draw(training.seed, "retain", step, len(self.retain), term.facts)
        return _batches(self.retain, chosen, training.batch_tokens)

    def text_batches(self, term: Retain, training: Training, step: int) -> Iterator[Batch]:
        """This step's blocks of neutral text."""
        chosen = draw(training.seed, "text", step, len(self.texts), term.texts)
        return _batches(self.texts, chosen, training.batch_tokens)

    def fingerprint(self) -> list[object]:
        """What the examples are, as JSON values."""
        groups = (self.forget, self.retain, self.texts)
        return [[[list(one.ids), one.target_start] for one in group] for group in groups]


def _batches(encoded: Sequence[Encoded], chosen: Sequence[int], max_tokens: int) -> Iterator[Batch]:
    """Batches of the chosen examples that keep their numbers in the whole list."""
    for batch in batches([encoded[i] for i in chosen], max_tokens):
        yield collate(encoded, [chosen[i] for i in batch.examples])
