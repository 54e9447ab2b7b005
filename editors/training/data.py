"""The data of a training run, and the batches of each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from editors.editor import EditData
from editors.training.retain import Retain
from editors.training.rewording import encoded_rewordings
from editors.training.settings import Training, draw
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import Batch, TargetScores, batches, collate, measure
from locus.model import Model
from locus.tokens import Encoded, encode, encode_text

N_PROBE = 32
"""Number of retain facts that utility is measured on."""


@dataclass(frozen=True, eq=False)
class ForgetExamples:
    """Forget examples in one kind of wording."""

    facts: Sequence[Fact]
    """Fact of each example; its prompt is the wording used."""
    encoded: list[Encoded]
    """Tokens of each example."""
    reference: TargetScores
    """The base's scores of the examples."""


@dataclass(frozen=True, eq=False)
class Data:
    """Encoded examples, and the base's scores of the forget examples."""

    facts: Sequence[Fact]
    """The forget facts."""
    kept_facts: Sequence[Fact]
    """Retain facts that may be trained on: those not held out."""
    forget: list[Encoded]
    """Tokens of each forget fact."""
    retain: list[Encoded]
    """Tokens of each retain fact in `kept_facts`."""
    texts: list[Encoded]
    """Blocks of neutral text."""
    reference: TargetScores
    """The base's scores of the forget examples."""
    probe: list[Encoded]
    """Retain facts that the base has right; utility is the share still right."""
    reworded: ForgetExamples
    """The forget facts in other words; empty with `Training.reworded` 0."""

    @classmethod
    def read(
        cls,
        model: Model,
        data: EditData,
        term: Retain,
        training: Training,
    ) -> Data:
        """Encode everything and measure the reference.

        Args:
            model: The base, unchanged in memory.
            data: Facts and texts.
            term: The retain term: whether retain data is needed.
            training: Seed, batch size and how many rewordings a step sees.

        Raises:
            InputError: nothing to forget, a retain term without data, or an example that cannot be encoded.
        """
        forget, text = data.forget, data.text
        if not forget:
            raise InputError("nothing to forget: the list of facts is empty")
        kept = data.trainable_retain
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
        reworded_facts, reworded = encoded_rewordings(model, forget if training.reworded else ())
        return cls(
            facts=forget,
            kept_facts=kept,
            forget=encoded,
            retain=encoded_kept,
            texts=[block for paragraph in text for block in encode_text(model, paragraph)],
            reference=measure(model, encoded, training.batch_tokens),
            probe=probe if training.utility else [],
            reworded=ForgetExamples(
                reworded_facts, reworded, measure(model, reworded, training.batch_tokens)
            ),
        )

    @property
    def plain(self) -> ForgetExamples:
        """The forget examples as they were given."""
        return ForgetExamples(self.facts, self.forget, self.reference)

    def forget_batches(self, training: Training, step: int) -> Iterator[Batch]:
        """This step's forget examples; `Batch.examples` are numbers in `forget`."""
        chosen = draw(training.seed, "forget", step, len(self.forget), training.forget_per_step)
        return batched(self.forget, chosen, training.batch_tokens)

    def reworded_batches(self, training: Training, step: int) -> Iterator[Batch]:
        """This step's forget facts in other words; `Batch.examples` are numbers in `reworded`."""
        encoded = self.reworded.encoded
        chosen = draw(training.seed, "reworded", step, len(encoded), training.reworded)
        return batched(encoded, chosen, training.batch_tokens)

    def retain_batches(self, term: Retain, training: Training, step: int) -> Iterator[Batch]:
        """This step's retain facts, `term.near` of them from the relations of the forgotten facts.

        Where one kind has too few facts, the other makes up for it.
        """
        relations = {fact.relation for fact in self.facts} - {None}
        near = [i for i, fact in enumerate(self.kept_facts) if fact.relation in relations]
        far = [i for i, fact in enumerate(self.kept_facts) if fact.relation not in relations]
        n_far = min(len(far), term.facts - min(len(near), round(term.near * term.facts)))
        n_near = term.facts - n_far
        chosen = [near[i] for i in draw(training.seed, "near", step, len(near), n_near)]
        chosen += [far[i] for i in draw(training.seed, "retain", step, len(far), n_far)]
        return batched(self.retain, chosen, training.batch_tokens)

    def text_batches(self, term: Retain, training: Training, step: int) -> Iterator[Batch]:
        """This step's blocks of neutral text."""
        chosen = draw(training.seed, "text", step, len(self.texts), term.texts)
        return batched(self.texts, chosen, training.batch_tokens)

    def fingerprint(self) -> list[object]:
        """What the examples are, as JSON values."""
        groups = (self.forget, self.retain, self.texts, self.reworded.encoded)
        return [[[list(one.ids), one.target_start] for one in group] for group in groups]


def batched(encoded: Sequence[Encoded], chosen: Sequence[int], max_tokens: int) -> Iterator[Batch]:
    """Batches of the chosen examples that keep their numbers in the whole list."""
    for batch in batches([encoded[i] for i in chosen], max_tokens):
        yield collate(encoded, [chosen[i] for i in batch.examples])
