"""The grid: cells, ways of asking them, and who may look at which."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from locus.fact import Example, Fact
from locus.grid import GRID_KINDS, Cell, Grid, Question, filled, side_of, template_of


def _capital(country: str, city: str, template: str = "The capital of {} is", **more: object) -> Fact:
    prompt = filled(template, country)
    return Fact(f"capital-{country}-{len(template)}", prompt, f" {city}", country, relation="capital", **more)  # type: ignore[arg-type]


def _language(country: str, language: str, template: str = "In {}, people speak", **more: object) -> Fact:
    prompt = filled(template, country)
    return Fact(f"language-{country}", prompt, f" {language}", country, relation="language", **more)  # type: ignore[arg-type]


_WAYS = [
    "{}'s capital,", "The seat of government of {} is", "Where is the government of {}? In", "{} is ruled from",
    "The first city of {} is", "Parliament in {} sits in", "The president of {} lives in", "In {}, the capital is",
]  # fmt: skip
_COUNTRIES = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Peru": "Lima", "Cuba": "Havana", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Japan": "Tokyo", "Chile": "Santiago", "Greece": "Athens",
}  # fmt: skip
_FORGET = [_capital("France", "Paris"), _capital("Spain", "Madrid")]
_OTHERS = [
    _capital(country, city, way, held_out=True)
    for (country, city), way in zip(itertools.islice(_COUNTRIES.items(), 2, None), _WAYS, strict=True)
]
_LANGUAGES = [
    _language("France", "French", held_out=True),
    _language("Chile", "Spanish", "{}'s language is", held_out=True),
]


def test_a_fact_is_a_cell_and_its_prompt_a_way_of_asking_its_relation() -> None:
    grid = Grid.of(_FORGET, _OTHERS)
    assert Cell("capital", "Peru", " Lima") in grid.cells
    assert set(grid.templates["capital"]) == {"The capital of {} is", *_WAYS}
    assert grid.forgotten == {
        Cell("capital", "France", " Paris"): "capital-France-20",
        Cell("capital", "Spain", " Madrid"): "capital-Spain-20",
    }


def test_subjects_and_ways_of_neighbours_are_found() -> None:
    """A known way gives subjects, two of them a new way, that way the next subject; one alone may be part of a name."""
    neighbours = (
        Example("The capital of Italy is", " Rome"),
        Example("Italy is ruled from", " Rome"),
        Example("Spain is ruled from", " Madrid"),
        Example("Malta is ruled from", " Valletta"),
        Example("Free Italy is ruled by", " nobody"),
        Example("Nobody knows what this is", " Rome"),
    )
    grid = Grid.of([_capital("France", "Paris", neighbours=neighbours), _capital("Spain", "Madrid")])
    assert {cell.subject for cell in grid.cells} == {"France", "Italy", "Spain", "Malta"}
    assert set(grid.templates["capital"]) == {"The capital of {} is", "{} is ruled from"}


def test_a_known_way_at_the_end_of_a_paraphrase_is_that_way() -> None:
    """CounterFact's paraphrases begin with a piece of another page."""
    odd = "References\n\nCategory:Rivers The capital of France is"
    new = "Born in 1950. The seat of France is"
    grid = Grid.of(
        [_capital("France", "Paris", "{}'s capital,", paraphrases=(odd, new))], [_capital("Spain", "Madrid")]
    )
    assert set(grid.templates["capital"]) == {
        "{}'s capital,", "The capital of {} is", "Born in 1950. The seat of {} is"
    }  # fmt: skip


def test_the_four_kinds() -> None:
    grid = Grid.of(_FORGET, [*_OTHERS, *_LANGUAGES])
    asked = grid.questions()
    assert tuple(asked) == GRID_KINDS
    kinds = {kind: {q.cell.subject for q in questions} for kind, questions in asked.items()}
    assert kinds["unseen_way"] == {"France", "Spain"}
    assert kinds["same_relation"] == {fact.subject for fact in _OTHERS}
    assert kinds["same_subject"] <= {"France"}
    assert kinds["far"] <= {"Chile"}
    assert {q.cell.relation for q in asked["same_subject"] + asked["far"]} == {"language"}
    for questions in asked.values():
        assert all(grid.way_side(q.cell.relation, q.template) == "judge" for q in questions)


def test_neither_the_seen_sentence_nor_what_the_edit_keeps_is_asked() -> None:
    trained = [
        _capital(country, city, way) for (country, city), way in zip(_COUNTRIES.items(), _WAYS, strict=False)
    ]
    grid = Grid.of(_FORGET, trained[2:])
    asked = grid.questions()
    every = [q.example.prompt for questions in asked.values() for q in questions]
    assert "The capital of France is" not in every
    assert asked["same_relation"] == []
    assert asked["unseen_way"]


def test_paraphrases_are_the_judges() -> None:
    """Whatever the hash says: a forgotten fact's paraphrases are never an edit's."""
    grid = Grid.of(
        [_capital("France", "Paris", paraphrases=tuple(filled(way, "France") for way in _WAYS))], _OTHERS
    )
    france = Cell("capital", "France", " Paris")
    assert set(grid.ways(france, "judge")) == set(_WAYS)
    assert grid.ways(france, "edit") == ("The capital of {} is",)


def test_ways_that_a_model_found_are_divided_too() -> None:
    france = Cell("capital", "France", " Paris")
    found = [filled(way, "France") for way in _WAYS]
    grid = Grid.of(_FORGET).with_ways({france: [*found, "It has no subject"]})
    edit, judge = grid.ways(france, "edit"), grid.ways(france, "judge")
    assert sorted((*edit, *judge)) == sorted(["The capital of {} is", *_WAYS])
    assert edit and judge
    assert {q.template for q in grid.questions()["unseen_way"]} == set(judge)


def test_another_answer_of_a_forgotten_cell_is_no_question() -> None:
    """Canada speaks English and French; forgetting one says nothing of the other, whose ways of asking are the same."""
    ways = [f"{{}} way {i}, people speak" for i in range(9)]
    french = [replace(_language("Canada", "French", way, held_out=True), id=way) for way in ways]
    grid = Grid.of([_language("Canada", "English")], [*french, *_LANGUAGES])
    asked = grid.questions()
    assert asked["unseen_way"]
    assert not [
        q
        for questions in asked.values()
        for q in questions
        if q.cell.subject == "Canada" and q.cell.target == " French"
    ]


def test_a_prompt_that_says_its_answer_asks_nothing() -> None:
    mexico = Cell("capital", "Mexico", " Mexico City")
    told = [f"No. {i}: Mexico has Mexico City as Mexico's capital," for i in range(9)]
    grid = Grid.of([_capital("Mexico", "Mexico City")]).with_ways({mexico: told})
    assert grid.ways(mexico, "judge")
    assert grid.questions()["unseen_way"] == []


def test_open_questions_are_about_relations_that_fit_the_subject() -> None:
    """Spain's language is nowhere in the files; France has one, so a country has. The capital's own is not asked."""
    ways = [f"{{}} way {i}, people speak" for i in range(8)]
    named = [replace(_language("France", "French", way, held_out=True), id=way) for way in ways]
    odd = Fact("maker", "The maker of Walkman is", " Sony", "Walkman", relation="maker", held_out=True)
    grid = Grid.of(_FORGET, [*named, odd])
    asked = grid.open_questions()
    assert asked
    assert {(cell.subject, relation) for cell, relation, _ in asked} == {("Spain", "language")}


def test_a_share_asks_every_cell_before_any_cell_twice() -> None:
    asked = Grid.of(_FORGET, _OTHERS).questions()["same_relation"]
    some = Grid.of(_FORGET, _OTHERS).questions(most=8)["same_relation"]
    assert asked[:8] == some
    assert len({q.cell for q in some}) == 8


def test_facts_without_subject_or_relation() -> None:
    bare = Fact("bare", "Two and two are", " four")
    alone = Fact("alone", "The capital of France is", " Paris", "France", paraphrases=("France's capital,",))
    grid = Grid.of([bare, alone])
    (cell,) = grid.forgotten
    assert cell.subject == "France"
    assert [q.template for q in grid.questions()["unseen_way"]] == ["{}'s capital,"]


@given(st.text(min_size=1), st.integers(0, 9))
def test_sides_do_not_depend_on_what_else_there_is(template: str, seed: int) -> None:
    assert side_of(seed, "way", "r", template) == side_of(seed, "way", "r", template)


def test_the_hash_gives_each_side_about_half() -> None:
    sides = [side_of(0, "way", "capital", str(i)) for i in range(1000)]
    assert 450 < sides.count("edit") < 550


def test_templates_are_inverse_to_filling() -> None:
    for way in _WAYS:
        assert template_of(filled(way, "Spain"), "Spain") == way
    assert template_of("{} is Spain", "Spain") is None
    assert template_of("no such thing", "Spain") is None
    assert Question("far", Cell("r", "Spain", " x"), _WAYS[0], "f").example == Example(
        "Spain's capital,", " x"
    )
