"""The grid of facts: subjects × relations, each cell asked in many ways.

A fact file holds sentences. What a model knows is not the sentence: "The capital of France is" and "France's capital,"
ask one cell. Forgetting must go through all the ways of asking one cell and leave the rest of its row (the subject's
other relations) and of its column (the relation's other subjects) alone. This module reads the grid out of fact files,
divides ways of asking and subjects between the edit and the judge, and lists what there is to ask.

Nothing here runs a model. Which questions the base model answers is for the caller to find out: only those count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Literal

from locus.fact import Example, Fact
from locus.target_forms import says

SLOT = "{}"
"""Where the subject goes in a template."""
MOST_SUBJECT_WORDS = 8
"""Words that a subject found by its template may have at most."""

Side = Literal["edit", "judge"]
"""Who may look at a way of asking or at a subject."""
GridKind = Literal["unseen_way", "same_subject", "same_relation", "far"]
"""unseen_way: a forgotten cell, asked in a way that the edit did not see; same_subject: another relation of its
subject; same_relation: another subject of its relation; far: neither subject nor relation is a forgotten cell's."""
GRID_KINDS: tuple[GridKind, ...] = ("unseen_way", "same_subject", "same_relation", "far")


@dataclass(frozen=True, order=True)
class Cell:
    """One fact of the grid, whatever the sentence."""

    relation: str
    subject: str
    target: str
    """With its leading space."""

    def asked(self, template: str) -> Example:
        """The cell asked in one way."""
        return Example(filled(template, self.subject), self.target)


@dataclass(frozen=True)
class Question:
    """A cell asked in one way, by the judge."""

    kind: GridKind
    cell: Cell
    template: str
    """The way of asking, with `SLOT` where the subject stands."""
    fact: str
    """Id of the forgotten fact that it belongs to; of other cells, a name of the cell. Figures cluster by it."""

    @property
    def example(self) -> Example:
        return self.cell.asked(self.template)


@dataclass(frozen=True)
class Grid:
    """Cells, the ways of asking each relation, and which of both the edit has seen."""

    cells: tuple[Cell, ...]
    """Every cell that a file names, each once."""
    templates: Mapping[str, tuple[str, ...]]
    """By relation: ways of asking it, each with one `SLOT`."""
    forgotten: Mapping[Cell, str]
    """The cells to forget, with the id of the first fact that names each."""
    trained: frozenset[Cell] = frozenset()
    """Cells that the edit is told to keep: it sees them, so they say nothing about what it spares."""
    held_out: frozenset[Cell] = frozenset()
    """Cells that a file keeps from the edit."""
    seen_templates: frozenset[tuple[str, str]] = frozenset()
    """(relation, template) of the sentences that the edit is given to forget."""
    kept_templates: frozenset[tuple[str, str]] = frozenset()
    """(relation, template) of the forgotten facts' paraphrases, which only judge."""
    own_ways: Mapping[Cell, tuple[str, ...]] = field(default_factory=dict)
    """By forgotten cell: ways of asking it that a model found, see `with_ways`."""
    seed: int = 0
    """Of the hash that divides ways and subjects."""

    @classmethod
    def of(cls, forget: Sequence[Fact], retain: Sequence[Fact] = (), seed: int = 0) -> Grid:
        """Read the grid out of facts: their subjects, relations, prompts, paraphrases and neighbours.

        A fact without a subject is no cell. One without a relation is a cell of a relation of its own, which has no
        other subjects. Subjects of neighbours are found by the templates of the relation, and templates by subjects
        already found, until nothing new turns up.

        Args:
            forget: Facts to forget.
            retain: Facts to keep; those not held out are the edit's.
            seed: Of the hash that divides ways and subjects between edit and judge.
        """
        reader = _Reader()
        facts = [*forget, *retain]
        for fact in facts:
            reader.add(fact)
        reader.find_neighbours(facts)
        for fact in facts:
            reader.add_paraphrases(fact)
        forgotten: dict[Cell, str] = {}
        for fact in forget:
            if (cell := cell_of(fact)) is not None:
                forgotten.setdefault(cell, fact.id)
        kept = {fact: reader.cell_at(fact) for fact in retain}
        return cls(
            cells=tuple(sorted(reader.cells)),
            templates={name: tuple(sorted(ways)) for name, ways in reader.templates.items()},
            forgotten=forgotten,
            trained=frozenset(cell for fact, cell in kept.items() if cell and not fact.held_out),
            held_out=frozenset(cell for fact, cell in kept.items() if cell and fact.held_out),
            seen_templates=frozenset(
                (relation_of(fact), template)
                for fact in forget
                if (template := template_of(fact.prompt, fact.subject, fact.subject_span)) is not None
            ),
            kept_templates=frozenset(
                (relation_of(fact), template) for fact in forget for template in reader.paraphrases(fact)
            ),
            seed=seed,
        )

    def with_ways(self, ways: Mapping[Cell, Sequence[str]]) -> Grid:
        """The grid with more ways of asking some cells (full prompts that hold the subject, as a model wrote them)."""
        own = {cell: list(known) for cell, known in self.own_ways.items()}
        for cell, prompts in ways.items():
            found = [template_of(prompt, cell.subject) for prompt in prompts]
            own[cell] = [*own.get(cell, ()), *(one for one in found if one is not None)]
        return replace(
            self, own_ways={cell: tuple(dict.fromkeys(templates)) for cell, templates in own.items()}
        )

    def way_side(self, relation: str, template: str) -> Side:
        """Whose a way of asking a relation is: by a hash.

        But the sentences that the edit was given to forget are the edit's, and their paraphrases are the judge's.
        """
        if (relation, template) in self.seen_templates:
            return "edit"
        if (relation, template) in self.kept_templates:
            return "judge"
        return side_of(self.seed, "way", relation, template)

    def subject_side(self, cell: Cell) -> Side:
        """Whose a cell that is not forgotten is: what its file says, else by a hash of the subject."""
        if cell in self.held_out:
            return "judge"
        if cell in self.trained:
            return "edit"
        return side_of(self.seed, "subject", cell.subject)

    def ways(self, cell: Cell, side: Side) -> tuple[str, ...]:
        """Templates that ask this cell and are one side's."""
        every = dict.fromkeys((*self.own_ways.get(cell, ()), *self.templates.get(cell.relation, ())))
        return tuple(one for one in every if self.way_side(cell.relation, one) == side)

    def peers(self, cell: Cell, side: Side) -> tuple[Cell, ...]:
        """Other subjects of the cell's relation that are one side's."""
        return tuple(
            other
            for other in self.cells
            if other.relation == cell.relation
            and other.subject != cell.subject
            and other not in self.forgotten
            and self.subject_side(other) == side
        )

    def questions(self, most: int | None = None) -> dict[GridKind, list[Question]]:
        """All that the judge may ask, by kind: unseen ways, of subjects that the edit did not see but the forgotten.

        A question whose prompt already says its target asks nothing and is left out.

        Args:
            most: Questions a kind at most: every cell once, then every cell twice, and so on; within a cell and among
                cells in the order of a hash. None for all.
        """
        found: dict[GridKind, list[Question]] = {kind: [] for kind in GRID_KINDS}
        places = {(cell.relation, cell.subject) for cell in self.forgotten}
        for cell in self.cells:
            kind = self._kind(cell, places)
            if kind is None:
                continue
            name = self.forgotten.get(cell, f"{cell.relation}: {cell.subject}")
            for template in self.ways(cell, "judge"):
                if not says(template.replace(SLOT, cell.subject), cell.target):
                    found[kind].append(Question(kind, cell, template, name))
        return {kind: self._spread(asked, most) for kind, asked in found.items()}

    def open_questions(self) -> list[tuple[Cell, str, str]]:
        """Ways of asking the forgotten subjects for other relations, whose answers no file knows.

        What the base model says there is to stay; the caller asks it. Only relations that share a subject with the
        forgotten cell's are asked: nobody asks a telephone for its capital.

        Returns:
            (forgotten cell, other relation, template), the judge's templates only.
        """
        subjects: dict[str, set[str]] = {}
        for cell in self.cells:
            subjects.setdefault(cell.relation, set()).add(cell.subject)
        named = {(cell.relation, cell.subject) for cell in self.cells}
        found = []
        for cell in self.forgotten:
            for relation, templates in self.templates.items():
                shared = subjects.get(relation, set()) & subjects[cell.relation]
                if relation == cell.relation or (relation, cell.subject) in named or not shared:
                    continue
                found += [
                    (cell, relation, one) for one in templates if self.way_side(relation, one) == "judge"
                ]
        return found

    def _kind(self, cell: Cell, places: Set[tuple[str, str]]) -> GridKind | None:
        """What the cell is to a judge; None where the edit saw it, or where it is a forgotten one's other answer.

        Args:
            places: (relation, subject) of the forgotten cells.
        """
        if cell in self.forgotten:
            return "unseen_way"
        if (cell.relation, cell.subject) in places or cell in self.trained:
            return None
        if cell.subject in {subject for _, subject in places}:
            return "same_subject"
        if self.subject_side(cell) == "edit":
            return None
        return "same_relation" if cell.relation in {relation for relation, _ in places} else "far"

    def _spread(self, questions: Sequence[Question], most: int | None) -> list[Question]:
        """Cells in turn, each in the order of a hash."""
        by_cell: dict[Cell, list[Question]] = {}
        for one in sorted(questions, key=lambda q: _digest(self.seed, "ask", q.cell.subject, q.template)):
            by_cell.setdefault(one.cell, []).append(one)
        turns = max(map(len, by_cell.values()), default=0)
        order = [asked[turn] for turn in range(turns) for asked in by_cell.values() if turn < len(asked)]
        return order[:most]


def side_of(seed: int, *what: str) -> Side:
    """Edit or judge, by a hash: the same wherever it is asked, whatever else there is."""
    return "edit" if int(_digest(seed, *what)[:8], 16) % 2 else "judge"


def relation_of(fact: Fact) -> str:
    """The fact's relation; one of its own where it names none."""
    return fact.relation or f"of {fact.subject or fact.id}: {fact.target.strip()}"


def cell_of(fact: Fact) -> Cell | None:
    """The fact's cell; None without a subject."""
    return None if fact.subject is None else Cell(relation_of(fact), fact.subject, fact.target)


def template_of(prompt: str, subject: str | None, span: tuple[int, int] | None = None) -> str | None:
    """The prompt with `SLOT` for its subject (at `span`, else its first occurrence); None where it has none.

    A text that holds `SLOT` already cannot be one.
    """
    if subject is None or SLOT in prompt or subject not in prompt:
        return None
    start, end = span or (prompt.index(subject), prompt.index(subject) + len(subject))
    return prompt[:start] + SLOT + prompt[end:]


def filled(template: str, subject: str) -> str:
    """The template about a subject."""
    return template.replace(SLOT, subject, 1)


class _Reader:
    """Cells and templates as they turn up."""

    def __init__(self) -> None:
        self.cells: set[Cell] = set()
        self.templates: dict[str, set[str]] = {}

    def add(self, fact: Fact) -> None:
        """A fact's cell, and its prompt as a way of asking."""
        cell = cell_of(fact)
        template = template_of(fact.prompt, fact.subject, fact.subject_span)
        if cell is not None and template is not None:
            self.cells.add(cell)
            self.templates.setdefault(cell.relation, set()).add(template)

    def add_paraphrases(self, fact: Fact) -> None:
        """A fact's paraphrases as ways of asking."""
        self.templates.setdefault(relation_of(fact), set()).update(self.paraphrases(fact))

    def paraphrases(self, fact: Fact) -> list[str]:
        """The templates of a fact's paraphrases.

        Where a way already known stands at the end of one, it is that way: CounterFact puts text of other pages before
        its paraphrases.
        """
        subject = fact.subject
        if subject is None:
            return []
        found = []
        for prompt in fact.paraphrases:
            known = self.templates.get(relation_of(fact), ())
            at_end = _longest(one for one in known if prompt.endswith(filled(one, subject)))
            template = at_end or template_of(prompt, subject)
            if template is not None:
                found.append(template)
        return found

    def find_neighbours(self, facts: Sequence[Fact]) -> None:
        """Subjects and ways of asking in the facts' neighbours, until there is nothing new.

        A known way gives a subject. Two subjects asked in one other way make it known: one alone may be part of a
        longer name ("Islamic {} is").
        """
        asked = [(relation_of(fact), one) for fact in facts if fact.relation for one in fact.neighbours]
        asked = list(dict.fromkeys(asked))
        size = -1
        while size != (size := self._size()):
            askers: dict[tuple[str, str], set[str]] = {}
            left = []
            for relation, example in asked:
                if subject := self._known_subject(relation, example.prompt):
                    self.cells.add(Cell(relation, subject, example.target))
                else:
                    left.append((relation, example))
            for relation, example in left:
                subjects = {cell.subject for cell in self.cells if cell.relation == relation}
                subject = _longest(one for one in subjects if _as_words(one, example.prompt))
                if subject is not None and (template := template_of(example.prompt, subject)):
                    askers.setdefault((relation, template), set()).add(subject)
            for (relation, template), subjects in askers.items():
                if len(subjects) > 1:
                    self.templates.setdefault(relation, set()).add(template)
            asked = left

    def cell_at(self, fact: Fact) -> Cell | None:
        """The cell of a fact, also of one that does not name its subject but asks in a known way."""
        if (cell := cell_of(fact)) is not None or fact.relation is None:
            return cell
        subject = self._known_subject(fact.relation, fact.prompt)
        return None if subject is None else Cell(fact.relation, subject, fact.target)

    def _known_subject(self, relation: str, prompt: str) -> str | None:
        """The subject that a known template of the relation has in this prompt, by the most specific template."""
        for template in sorted(self.templates.get(relation, ()), key=lambda one: (-len(one), one)):
            before, _, after = template.partition(SLOT)
            inside = prompt[len(before) : len(prompt) - len(after)]
            fits = prompt == before + inside + after and inside == inside.strip()
            if fits and 0 < len(inside.split()) <= MOST_SUBJECT_WORDS:
                return inside
        return None

    def _size(self) -> int:
        return len(self.cells) + sum(map(len, self.templates.values()))


def _as_words(subject: str, prompt: str) -> bool:
    """Whether the subject stands in the prompt as whole words, as it is written."""
    return subject in prompt and says(prompt, subject)


def _longest(texts: Iterable[str] | Iterator[str]) -> str | None:
    return max(sorted(texts), key=len, default=None)


def _digest(seed: int, *what: str) -> str:
    return hashlib.sha256("\x1f".join((str(seed), *what)).encode()).hexdigest()
