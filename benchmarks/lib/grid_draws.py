"""Draws of facts out of public files with relations, and what a judge asks about them: the grid's four kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from locus.fact import Fact
from locus.grid import Cell, Grid, filled
from locus.target_forms import says

ROWS = ("seen", "unseen_way", "retained", "same_relation", "same_subject")
"""The sentence the edit was given; the same cell in unseen ways; facts it was told to keep, in unseen ways; other
subjects of the relation; other relations of the subject."""
OF_A_RELATION = 3
"""Facts of one relation that a draw forgets, at most."""

Write = Callable[[Sequence[str]], Sequence[str]]
"""Prompts -> what a model writes behind each, greedily."""


@dataclass(frozen=True)
class Asked:
    """One question of the judge."""

    row: str
    """One of `ROWS`."""
    fact: str
    """The fact (or cell) it belongs to: what intervals resample."""
    prompt: str
    target: str
    """What the base model says there."""


@dataclass(frozen=True)
class Draw:
    """Facts to forget and to keep, and questions that the base model answers."""

    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...]
    asked: tuple[Asked, ...]


def draw(
    facts: Sequence[Fact], write: Write, seed: int, n_forget: int = 14, n_retain: int = 35, most: int = 60
) -> Draw:
    """Facts that the model answers, one sentence each, and what else there is to ask about their grid.

    Args:
        facts: With subject and relation; one sentence each is used, the others' wordings become ways of asking.
        write: The base model.
        seed: Seed of the draw, and of the grid's division of ways and subjects.
        n_forget: Facts to forget, `OF_A_RELATION` of one relation at most.
        n_retain: Facts to keep, of the same relations first.
        most: Questions of each row, at most.
    """
    order = random.Random(seed)
    pool = [replace(fact, paraphrases=(), neighbours=()) for fact in facts if fact.subject and fact.relation]
    order.shuffle(pool)
    pool = list({(fact.subject, fact.relation): fact for fact in pool}.values())
    some = pool[: 40 * (n_forget + n_retain)]
    written = write([fact.prompt for fact in some])
    known = [fact for fact, text in zip(some, written, strict=True) if says(text, fact.target)]
    forget = _forgotten(known, n_forget)
    left = [fact for fact in known if fact not in forget]
    relations = {fact.relation for fact in forget}
    left.sort(key=lambda fact: fact.relation not in relations)  # stable: the draw's order within
    retain = left[:n_retain]
    seen = {(fact.subject, fact.relation) for fact in (*forget, *retain)}
    others = [replace(fact, held_out=True) for fact in facts if (fact.subject, fact.relation) not in seen]
    grid = Grid.of(forget, [*retain, *others], seed)
    return Draw(tuple(forget), tuple(retain), tuple(_questions(grid, forget, retain, write, most)))


def _forgotten(known: Sequence[Fact], n: int) -> list[Fact]:
    """The first facts of the draw, `OF_A_RELATION` of one relation at most, each subject once."""
    found: list[Fact] = []
    for fact in known:
        of_it = sum(one.relation == fact.relation for one in found)
        if of_it < OF_A_RELATION and all(one.subject != fact.subject for one in found) and len(found) < n:
            found.append(fact)
    return found


def _questions(
    grid: Grid, forget: Sequence[Fact], retain: Sequence[Fact], write: Write, most: int
) -> list[Asked]:
    """All rows, those only that the base model answers."""
    asked = [Asked("seen", fact.id, fact.prompt, fact.target) for fact in forget]
    for kind, questions in grid.questions(4 * most).items():
        asked += [
            Asked(kind, one.fact, one.example.prompt, one.cell.target) for one in questions if kind in ROWS
        ]
    for fact in retain:
        cell = Cell(fact.relation or "", fact.subject or "", fact.target)
        ways = [filled(one, cell.subject) for one in grid.ways(cell, "judge")]
        asked += [Asked("retained", fact.id, way, fact.target) for way in ways if way != fact.prompt]
    written = write([one.prompt for one in asked])
    known = [one for one, text in zip(asked, written, strict=True) if says(text, one.target)]
    known += _open_questions(grid, write, 4 * most)
    return [one for row in ROWS for one in [q for q in known if q.row == row][:most]]


def _open_questions(grid: Grid, write: Write, most: int) -> list[Asked]:
    """Other relations of the forgotten subjects: what the base says there, unless it is what is to be forgotten."""
    places = grid.open_questions()
    random.Random(grid.seed).shuffle(places)
    places = places[:most]
    prompts = [filled(template, cell.subject) for cell, _, template in places]
    found = []
    for (cell, _, _), prompt, text in zip(places, prompts, write(prompts), strict=True):
        answer = first_word(text)
        if answer and not says(text, cell.target) and not says(prompt, answer):
            found.append(Asked("same_subject", grid.forgotten[cell], prompt, answer))
    return found


def first_word(text: str) -> str:
    """The first capitalized word of an answer with its space: what can be right or wrong in it; "" for none."""
    words = [word.strip(".,;:!?\"'()") for word in text.split("\n")[0].split()]
    return next((f" {word}" for word in words if word[:1].isupper() and len(word) > 2), "")
