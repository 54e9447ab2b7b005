"""What a model that never knew might say: a fact's wrong answers, its own or those of other facts.

A refusal that is taught for every fact is one direction, and whoever teaches a few facts anew turns all of them back.
Answers that differ from fact to fact leave nothing common to undo, and a guess among the answers of its kind is what
is left of a fact that was never there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from editors.key_value.edit_target import EditTarget
from locus.errors import InputError
from locus.fact import Fact, trainable_facts
from locus.forward import collate, label_logits
from locus.model import Model
from locus.target_forms import first_tokens, says
from locus.tokens import encode

FEWEST = 3
"""Wrong answers that a fact with fewer of its own is given, as far as there are other facts."""
LOOKED_AT = 200
"""Most probable next tokens among which a model's own guesses are looked for."""


def facts_for(
    model: Model,
    target: EditTarget,
    forget: Sequence[Fact],
    retain: Sequence[Fact] = (),
    seed: int = 0,
) -> Sequence[Fact]:
    """The facts to forget, with answers of other facts where the edit target is wrong answers.

    A wrong answer that begins with the token the right one begins with is not counted, and never drawn: it would teach
    what must go. A fact for which no other is found gets what the model itself finds most probable after its prompt
    apart from the answer.

    Args:
        model: Its tokenizer says what answers begin with; it is run only for facts without any other answer.
        target: What is wanted instead.
        forget: Facts to forget.
        retain: Facts to draw from, in addition to `forget`; held-out facts are not looked at.
        seed: Seed of the draws.
    """
    if target.to != "alternatives":
        return forget

    def usable(fact: Fact, answer: str) -> bool:
        return _first_token(model, fact, answer) != _first_token(model, fact, fact.target)

    drawn = with_others(forget, [*forget, *trainable_facts(retain)], seed, usable)
    return [
        fact
        if any(usable(fact, answer) for answer in fact.alternatives)
        else replace(fact, alternatives=own_guesses(model, fact))
        for fact in drawn
    ]


def with_others(
    facts: Sequence[Fact],
    pool: Sequence[Fact],
    seed: int = 0,
    usable: Callable[[Fact, str], bool] = lambda fact, answer: True,
) -> list[Fact]:
    """The facts with at least `FEWEST` alternatives each, drawn from the answers of `pool` where their own are fewer.

    Answers of the fact's relation come first. One that is the fact's own, or that it has already, is never drawn; nor
    is one of another fact of the same subject, which would be taught where it has to go or to stay.
    What is drawn depends on the seed, the fact and the pool alone. A fact for which nothing is found stays as it is.

    Args:
        facts: Facts to forget.
        pool: Facts whose answers are drawn.
        seed: Seed of the draws.
        usable: Whether an answer may stand for a fact's own; others are neither counted nor drawn.
    """
    return [
        replace(fact, alternatives=(*fact.alternatives, *_drawn(fact, pool, seed, usable))) for fact in facts
    ]


@torch.no_grad()
def own_guesses(model: Model, fact: Fact) -> tuple[str, ...]:
    """The `FEWEST` most probable words after the fact's prompt that do not begin as its answer does in any form.

    Raises:
        InputError: there is none among the `LOOKED_AT` most probable tokens.
    """
    batch = collate([encode(model, fact)], [0])
    order = label_logits(model, batch)[0].argsort(descending=True).tolist()[:LOOKED_AT]
    forms = set(first_tokens(model.tokenizer, fact.target)) | {_first_token(model, fact, fact.target)}
    found: list[str] = []
    for token in order:
        text = str(model.tokenizer.decode([token]))
        if token in forms or not any(map(str.isalnum, text)) or says(fact.target, text):
            continue
        if encode(model, replace(fact, target=text)).target_ids == (token,):
            found.append(text)
        if len(found) == FEWEST:
            break
    if not found:
        raise InputError(
            f"{fact.source or f'fact {fact.id!r}'}: no wrong answer was found: give alternatives, or --retain facts to "
            "draw them from, or use --target-to refusal"
        )
    return tuple(found)


def _first_token(model: Model, fact: Fact, answer: str) -> int:
    """What an answer begins with after the fact's prompt."""
    return encode(model, replace(fact, target=answer)).target_ids[0]


def _same_subject(one: Fact, other: Fact) -> bool:
    return None not in (one.subject, other.subject) and str(one.subject).lower() == str(other.subject).lower()


def _drawn(fact: Fact, pool: Sequence[Fact], seed: int, usable: Callable[[Fact, str], bool]) -> list[str]:
    """Answers of other facts, as many as are missing."""
    known = {answer.strip().lower() for answer in (fact.target, *fact.alternatives)}
    of_subject = {other.target for other in pool if _same_subject(fact, other)}
    near: set[str] = set()
    far: set[str] = set()
    for other in pool:
        if other.target.strip().lower() not in known and other.target not in of_subject:
            (near if fact.relation and other.relation == fact.relation else far).add(other.target)
    order = random.Random(f"{seed}-{fact.id}")
    missing = max(0, FEWEST - sum(usable(fact, answer) for answer in fact.alternatives))

    def draw(answers: set[str], n: int) -> list[str]:
        left = sorted(answers)
        while True:
            drawn = order.sample(left, min(n, len(left)))
            unusable = {answer for answer in drawn if not usable(fact, answer)}
            if not unusable:
                return drawn
            left = [answer for answer in left if answer not in unusable]

    drawn = draw(near, missing)
    return [*drawn, *draw(far - near, missing - len(drawn))]
