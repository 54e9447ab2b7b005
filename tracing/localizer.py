"""What every localizer of the table is: its protocol, what a run costs, and the loop over examples that most share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import Batch, batches
from locus.model import Model
from locus.nonfinite import blame
from locus.parallel.map import each
from locus.tokens import Encoded, encode

Examples = Sequence[Fact | Example | Encoded]
"""What localizers are run on: facts, bare prompts with targets, or tokens."""


@dataclass(frozen=True)
class Cost:
    """Work in passes of one example through the whole model.

    A pass that touches only a part of the model, or a part of the positions, counts for that part: half of
    the layers is half a forward, one position of a prompt of 48 is a forty-eighth.
    """

    forwards: float | int = 0
    """Forward passes of one example."""
    backwards: float | int = 0
    """Backward passes of one example; each is worth about one to two forwards."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)

    def __mul__(self, times: float | int) -> Cost:
        return Cost(self.forwards * times, self.backwards * times)

    def __str__(self) -> str:
        return f"{self.forwards:,.4g} forwards and {self.backwards:,.4g} backwards of one example"


@runtime_checkable
class Localizer(Protocol):
    """What the table holds: a frozen dataclass whose fields are its settings."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """What a run takes, told before it starts; nothing is computed."""
        ...

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> Any:
        """Scores of neurons, weights, rows or tensors.

        Args:
            model: Left as it is.
            facts: What must go.
            retain: What must stay; most localizers do not look at it.
            batch_tokens: Tokens computed at once; changes speed and memory, not the scores.
        """
        ...


@runtime_checkable
class PublishedThreshold(Protocol):
    """A localizer whose paper keeps the neurons above a threshold."""

    PAPER_THRESHOLD: ClassVar[float]
    """That threshold, as a share of the highest score or as the paper scales it."""


def encode_facts(model: Model, facts: Examples, what: str = "facts") -> list[Encoded]:
    """Encode what a localizer was given.

    Raises:
        InputError: there is nothing to locate.
    """
    if not facts:
        raise InputError(f"no {what} given: a localizer needs at least one")
    return [(fact if isinstance(fact, Encoded) else encode(model, fact)).without_end for fact in facts]


def required(retain: Examples | None, method: str) -> Examples:
    """The retain set of a method that cannot do without.

    Raises:
        InputError: none was given.
    """
    if not retain:
        raise InputError(f"{method} compares with a retain set and none was given: add one (--retain FILE)")
    return retain


@dataclass(frozen=True, eq=False)
class ExampleLoop:
    """The examples of one run, and the loop over them: shared by processes, and stopped at the first NaN.

    What is added up is added in the order of the examples, whoever computed it: to the bit one process's sum.
    """

    model: Model
    facts: Examples
    encoded: Sequence[Encoded]
    what: str
    """What is computed of an example, for the error: begins with "its"."""

    @classmethod
    def of(cls, model: Model, facts: Examples, what: str, named: str = "facts") -> ExampleLoop:
        """Encode the examples.

        Args:
            model: Whose tokenizer encodes them.
            facts: The examples.
            what: What is computed of an example, beginning with "its".
            named: What the examples are called where there are none.

        Raises:
            InputError: there are none.
        """
        return cls(model, facts, encode_facts(model, facts, named), what)

    def over_batches(
        self, work: Callable[[Batch], tuple[Tensor, ...]], description: str, batch_tokens: int
    ) -> tuple[Tensor, ...]:
        """Sum of what `work` makes of each batch of examples.

        Args:
            work: From a batch to tensors of the same shapes for every batch.
            description: For the line of progress.
            batch_tokens: Tokens in a batch, padding included.

        Raises:
            InputError: NaN or infinity; names the layer and the example.
        """
        return _sum(each(batches(self.encoded, batch_tokens), work, description, self._batch_at_fault))

    def over_examples(
        self, work: Callable[[int], tuple[Tensor, ...]], description: str
    ) -> tuple[Tensor, ...]:
        """Sum of what `work` makes of each example, given its number.

        Raises:
            InputError: NaN or infinity; names the layer and the example.
        """
        return _sum(each(range(len(self.encoded)), work, description, self._example_at_fault))

    def at_fault(self, numbers: Sequence[int]) -> InputError:
        """The error for examples, by their numbers, of which something is not finite."""
        named = [(getattr(self.facts[i], "id", f"number {i + 1}"), self.encoded[i]) for i in numbers]
        return blame(self.model, named, self.what)

    def _batch_at_fault(self, batch: Batch) -> InputError:
        return self.at_fault(batch.examples)

    def _example_at_fault(self, number: int) -> InputError:
        return self.at_fault([number])


def _sum(pieces: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    total = tuple(tensor.clone() for tensor in next(pieces))
    for piece in pieces:
        for sum_, tensor in zip(total, piece, strict=True):
            sum_ += tensor.to(sum_.device)
    return total
