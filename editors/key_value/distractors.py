"""What a model that never knew might say: a fact's wrong answers, its own or those of other facts.

A refusal that is taught for every fact is one direction, and whoever teaches a few facts anew turns all of them back.
Answers that differ from fact to fact leave nothing common to undo, and a guess among the answers of its kind is what
is left of a fact that was never there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from editors.key_value.target_value import EditTarget
from locus.fact import Fact, trainable_facts

FEWEST = 3
"""Wrong answers that a fact with fewer of its own is given, as far as there are other facts."""


def facts_for(
    target: EditTarget, forget: Sequence[Fact], retain: Sequence[Fact] = (), seed: int = 0
) -> Sequence[Fact]:
    """The facts to forget, with answers of other facts where the edit target is wrong answers.

    Held-out facts are not looked at.
    """
    if target.to != "alternatives":
        return forget
    return with_others(forget, [*forget, *trainable_facts(retain)], seed)


def with_others(facts: Sequence[Fact], pool: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """The facts with at least `FEWEST` alternatives each, drawn from the answers of `pool` where their own are fewer.

    Answers of the fact's relation come first; one that is the fact's own, or that it has already, is never drawn.
    What is drawn depends on the seed, the fact and the pool alone. A fact for which nothing is found stays as it is.
    """
    return [replace(fact, alternatives=(*fact.alternatives, *_drawn(fact, pool, seed))) for fact in facts]


def _drawn(fact: Fact, pool: Sequence[Fact], seed: int) -> list[str]:
    """Answers of other facts, as many as are missing."""
    known = {answer.strip().lower() for answer in (fact.target, *fact.alternatives)}
    near: set[str] = set()
    far: set[str] = set()
    for other in pool:
        if other.target.strip().lower() not in known:
            (near if fact.relation and other.relation == fact.relation else far).add(other.target)
    order = random.Random(f"{seed}-{fact.id}")
    missing = max(0, FEWEST - len(fact.alternatives))
    drawn = order.sample(sorted(near), min(missing, len(near)))
    rest = sorted(far - near)
    return [*drawn, *order.sample(rest, min(missing - len(drawn), len(rest)))]
