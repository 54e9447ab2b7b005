"""Which facts a model knows: only what it answers can be traced, and only what it answers can be forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from locus.errors import InputError
from locus.finite_checks import is_finite
from locus.forward import measure
from locus.nonfinite import blame
from locus.tokens import Encoded, encode

if TYPE_CHECKING:
    from locus.fact import Fact
    from locus.model import Model


@dataclass(frozen=True)
class KnownFact:
    """How a model answers one fact, its paraphrases and its neighbours."""

    fact: Fact
    prob: float
    """Probability of the whole target after the prompt."""
    right: bool
    """Whether every token of the target is the model's first choice."""
    paraphrases: tuple[bool, ...]
    """The same for each paraphrase."""
    neighbours: tuple[bool, ...]
    """The same for each neighbour."""


@dataclass(frozen=True)
class KnownSummary:
    """What a model knows of a set of facts; a share is None where there is nothing to count."""

    n_facts: int
    mean_prob: float | None
    """Mean probability of the target."""
    right: float | None
    """Share of the facts answered right."""
    paraphrases_right: float | None
    """Share of all paraphrases answered right."""
    neighbours_right: float | None
    """Share of all neighbours answered right."""


def known(model: Model, facts: Sequence[Fact], max_tokens: int = 4096) -> list[KnownFact]:
    """Ask the model every fact, paraphrase and neighbour.

    Args:
        max_tokens: Padded tokens a batch.

    Returns:
        One entry a fact, in order.

    Raises:
        InputError: a text does not split at its target or is too long; names the fact and which text. Or the model
            gives NaN or infinity; names the layer and the fact.
    """
    encoded = [_encode_all(model, fact) for fact in facts]
    scores = measure(model, list(chain.from_iterable(encoded)), max_tokens=max_tokens)
    if not is_finite(scores.nll):
        named = [(fact.id, one) for fact, texts in zip(facts, encoded, strict=True) for one in texts]
        raise blame(model, named, "the probability of the target")
    probs, right = scores.prob.tolist(), scores.correct.tolist()
    found, start = [], 0
    for fact, texts in zip(facts, encoded, strict=True):
        end = start + len(texts)
        first_neighbour = end - len(fact.neighbours)
        found.append(
            KnownFact(
                fact=fact,
                prob=probs[start],
                right=right[start],
                paraphrases=tuple(right[start + 1 : first_neighbour]),
                neighbours=tuple(right[first_neighbour:end]),
            )
        )
        start = end
    return found


def summarize(found: Sequence[KnownFact]) -> KnownSummary:
    """Means over facts, shares over all paraphrases and over all neighbours."""
    return KnownSummary(
        n_facts=len(found),
        mean_prob=_mean([one.prob for one in found]),
        right=_mean([one.right for one in found]),
        paraphrases_right=_mean([right for one in found for right in one.paraphrases]),
        neighbours_right=_mean([right for one in found for right in one.neighbours]),
    )


def known_facts(found: Sequence[KnownFact], min_prob: float = 0.0) -> list[Fact]:
    """The facts answered right with at least probability `min_prob`."""
    return [one.fact for one in found if one.right and one.prob >= min_prob]


def _mean(values: Sequence[bool] | Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _encode_all(model: Model, fact: Fact) -> list[Encoded]:
    """The fact, its paraphrases and its neighbours; the fact's own errors already say where."""
    encoded = [encode(model, fact)]
    for kind, examples in (("paraphrase", fact.paraphrase_examples), ("neighbour", fact.neighbours)):
        for number, example in enumerate(examples, 1):
            try:
                encoded.append(encode(model, example))
            except InputError as error:
                raise InputError(f"{fact.source or fact.id}, {kind} {number}: {error}") from None
    return encoded
