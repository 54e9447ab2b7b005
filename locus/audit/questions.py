"""Does it still answer: teacher-forced scores of each question, kept one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.audit.intervals import Items
from locus.errors import InputError
from locus.fact import Example, Fact, held_out_facts, trainable_facts
from locus.forward import measure
from locus.grid import Grid
from locus.model import Model
from locus.tokens import Encoded, encode

QUESTION_KINDS = (
    "forget",
    "paraphrase",
    "neighbour",
    "held_out",
    "held_out_near",
    "held_out_far",
    "retained",
    "unseen_way",
    "same_subject",
    "same_relation",
    "far",
)
"""Kinds of question, see `split_facts` and, for the last four, `grid_questions`."""
MOST_GRID = 48
"""Questions of each of the grid's kinds that are asked at most: every cell once, then every cell twice, and so on."""


@dataclass(frozen=True)
class Questions:
    """Examples of one kind and the fact each belongs to."""

    facts: tuple[str, ...]
    """Fact id of each example."""
    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]

    def __len__(self) -> int:
        return len(self.facts)

    def take(self, indices: Sequence[int]) -> Questions:
        """Some of the questions, in the order of `indices`."""
        return Questions(
            tuple(self.facts[i] for i in indices),
            tuple(self.examples[i] for i in indices),
            tuple(self.encoded[i] for i in indices),
        )


@dataclass(frozen=True)
class Answers:
    """What one model state gives to each question."""

    facts: tuple[str, ...]
    """Fact id of each question."""
    nll: Float[Tensor, " question"]
    """Negative log-likelihood of the whole target in nats; infinite where the model gave no number."""
    n_tokens: Int[Tensor, " question"]
    """Tokens of each target."""
    correct: Bool[Tensor, " question"]
    """Whether every target token is the model's first choice."""

    @property
    def prob(self) -> Items:
        """Probability of the whole target."""
        return Items(self.facts, (-self.nll).exp())

    @property
    def token_prob(self) -> Items:
        """Geometric mean of the probabilities of the target's tokens."""
        return Items(self.facts, (-self.nll / self.n_tokens).exp())

    @property
    def top1(self) -> Items:
        """1 where the model answers right."""
        return Items(self.facts, self.correct.float())

    @property
    def surprise(self) -> Items:
        """NLL of the whole target, in nats."""
        return Items(self.facts, self.nll)


def ask(model: Model, questions: Questions, max_tokens: int = 4096) -> Answers:
    """Score every question; a model that gives NaN answers nothing right with probability 0."""
    scores = measure(model, questions.encoded, max_tokens)
    broken = ~torch.isfinite(scores.nll)
    return Answers(
        questions.facts,
        torch.where(broken, torch.inf, scores.nll),
        scores.n_tokens,
        scores.correct & ~broken,
    )


def questions_of(model: Model, pairs: Sequence[tuple[str, Example | Fact]]) -> Questions:
    """Encode examples, each with the id of its fact.

    Raises:
        InputError: an example that cannot be encoded.
    """
    examples = [e.example if isinstance(e, Fact) else e for _, e in pairs]
    return Questions(tuple(i for i, _ in pairs), tuple(examples), tuple(encode(model, e) for e in examples))


def split_facts(forget: Sequence[Fact], retain: Sequence[Fact]) -> dict[str, list[tuple[str, Example]]]:
    """All questions an audit asks, by kind, each with its fact's id.

    `held_out` facts are those of the retain file that no edit may train on; they are near when they share
    a relation with a forgotten fact, far otherwise. A held-out fact without a relation is neither. A neighbour that
    is also a retain fact to train on, word for word, says nothing about what was spared and is not asked.

    Raises:
        InputError: no forget facts, a fact id used twice, or a forget fact among those to keep.
    """
    if not forget:
        raise InputError("audit: the forget set is empty; there is nothing to audit")
    for facts, where in ((forget, "forget"), (retain, "retain")):
        seen: set[str] = set()
        for fact in facts:
            if fact.id in seen:
                raise InputError(f"audit: two {where} facts have the id {fact.id!r}; figures are kept by id")
            seen.add(fact.id)
    gone = {fact.example: fact.id for fact in forget}
    for fact in retain:
        if fact.example in gone:
            raise InputError(
                f"audit: retain fact {fact.id!r} is forget fact {gone[fact.example]!r}, word for word; it cannot both "
                f"go and stay: take it out of one file"
            )
    held_out = held_out_facts(retain)
    relations = {fact.relation for fact in forget} - {None}
    known = [fact for fact in held_out if fact.relation is not None] if relations else []
    trained = {fact.example for fact in trainable_facts(retain)}
    return {
        "forget": [(f.id, f.example) for f in forget],
        "paraphrase": [(f.id, e) for f in forget for e in f.paraphrase_examples],
        "neighbour": [(f.id, e) for f in forget for e in f.neighbours if e not in trained],
        "held_out": [(f.id, f.example) for f in held_out],
        "held_out_near": [(f.id, f.example) for f in known if f.relation in relations],
        "held_out_far": [(f.id, f.example) for f in known if f.relation not in relations],
        "retained": [(f.id, f.example) for f in trainable_facts(retain)],
    }


def grid_questions(
    forget: Sequence[Fact], retain: Sequence[Fact], most: int = MOST_GRID
) -> dict[str, list[tuple[str, Example]]]:
    """What the fact files ask beyond their sentences, by kind: see `locus.grid.GridKind`.

    A forgotten fact in ways that the edit did not see, and facts that the edit did not see: of the same subjects, of
    the same relations, of neither. Kinds that the files cannot fill are empty: they are not measured.

    Args:
        forget: Facts that had to go.
        retain: Facts that had to stay.
        most: Questions of each kind at most.
    """
    found = Grid.of(forget, retain).questions(most)
    return {kind: [(one.fact, one.example) for one in asked] for kind, asked in found.items()}


def subset(answers: Answers, questions: Mapping[str, Questions], kind: str) -> Answers:
    """The answers to `questions[kind]` taken out of the answers to a kind that contains them."""
    wanted = set(questions[kind].facts)
    keep = torch.tensor([fact in wanted for fact in answers.facts], dtype=torch.bool)
    return Answers(
        tuple(fact for fact in answers.facts if fact in wanted),
        answers.nll[keep],
        answers.n_tokens[keep],
        answers.correct[keep],
    )
