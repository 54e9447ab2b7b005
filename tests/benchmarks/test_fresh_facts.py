"""Facts that nothing was tuned on: which are taken, in which other words, and what is held against the aims."""

from __future__ import annotations

from benchmarks.fresh_facts import (
    FORGOTTEN,
    MOST_OF_A_RELATION,
    cell,
    draw,
    in_other_words,
    table,
    templates_of,
)
from locus.fact import Fact


def fact(name: str, target: str, prompt: str = "{} is in", relation: str | None = "place") -> Fact:
    return Fact(id=name, prompt=prompt.format(name), target=target, subject=name, relation=relation)


def test_other_words_are_the_prompts_of_the_relation_about_ones_own_subject() -> None:
    oslo, rome = fact("Oslo", " Norway"), fact("Rome", " Italy", "The country of {} is")
    templates = templates_of(
        [oslo, rome, fact("red", " colour", "{} is a", "kind"), fact("x", " y", "{}", None)]
    )
    assert templates == {"place": ["{} is in", "The country of {} is"], "kind": ["{} is a"]}
    assert in_other_words(oslo, templates).paraphrases == ("The country of Oslo is",)
    assert in_other_words(fact("x", " y", "{}", None), templates).paraphrases == ()


def test_a_subject_that_stands_twice_makes_no_template() -> None:
    twice = Fact(
        id="a", prompt="Rome, in Rome, is", target=" big", subject="Rome", subject_start=0, relation="r"
    )
    assert templates_of([twice]) == {}


def known(n: int, relations: int, answers: int) -> list[Fact]:
    made = [fact(f"s{i}", f" t{i % answers}", relation=f"r{i % relations}") for i in range(n)]
    return [in_other_words(one, {one.relation or "": ["So {} is in"]}) for one in made]


def test_a_draw_has_no_answer_twice_and_few_of_a_relation() -> None:
    every = known(200, 7, 60)
    drawn = draw(every, 0)
    assert len(drawn.forget) == FORGOTTEN
    assert len({one.target for one in drawn.forget}) == FORGOTTEN
    of = [one.relation for one in drawn.forget]
    assert max(map(of.count, of)) <= MOST_OF_A_RELATION
    assert {one.id for one in drawn.forget}.isdisjoint(one.id for one in drawn.retain)
    assert len(drawn.retain) == 200 - FORGOTTEN
    assert sum(one.held_out for one in drawn.retain) == len(drawn.retain) // 2
    assert [one.id for one in draw(every, 0).forget] == [one.id for one in drawn.forget]
    assert [one.id for one in draw(every, 1).forget] != [one.id for one in drawn.forget]


def test_facts_without_other_words_are_never_forgotten() -> None:
    bare = [fact(f"b{i}", f" u{i}", relation=f"q{i}") for i in range(50)]
    assert all(
        one.paraphrases == (f"So {one.subject} is in",) for one in draw([*bare, *known(60, 9, 60)], 3).forget
    )


def test_what_misses_its_aim_is_bold() -> None:
    assert cell(0.02, 0.01) == "**0.02**" and cell(0.01, 0.01) == "0.01"
    assert cell(0.89, -0.9) == "**0.89**" and cell(0.9, -0.9) == "0.90"
    assert cell(87.0, None) == "87" and cell(None, -0.6) == "not asked"
    text = table({10: {"p(target)": 0.02, "seconds": 59.0}})
    assert "draw 10" in text and "| p(target) | **0.02** | at most 0.01 |" in text
