"""The grid's benchmark: draws from a model that is a dictionary, and the table."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.grid import table
from benchmarks.lib.grid_draws import OF_A_RELATION, ROWS, draw, first_word
from locus.fact import Fact
from locus.grid import Grid, filled

_CAPITALS = {f"Land{i}": f"City{i}" for i in range(30)}
_LANGUAGES = {f"Land{i}": f"Tongue{i}" for i in range(5, 40)}
_WAYS = {
    "capital": [f"way {i}: the capital of {{}} is" for i in range(8)],
    "language": [f"way {i}: in {{}} they speak" for i in range(8)],
}


def _facts() -> list[Fact]:
    return [
        Fact(
            f"{relation}-{subject}",
            filled(_WAYS[relation][i % 8], subject),
            f" {target}",
            subject,
            relation=relation,
        )
        for relation, pairs in (("capital", _CAPITALS), ("language", _LANGUAGES))
        for i, (subject, target) in enumerate(pairs.items())
    ]


def _write(prompts: Sequence[str]) -> list[str]:
    """It knows every language, every second capital, and nothing of Land39."""
    found = []
    for prompt in prompts:
        subject = next(word for word in prompt.split() if word.startswith("Land"))
        pairs = _CAPITALS if "capital" in prompt else _LANGUAGES
        knows = subject != "Land39" and (pairs is _LANGUAGES or int(subject[4:]) % 2 == 0)
        found.append(f" {pairs.get(subject, 'Nowhere')}, of course" if knows else " what nobody knows")
    return found


def test_a_draw_forgets_what_the_model_knows_and_asks_what_the_edit_does_not_see() -> None:
    facts = _facts()
    drawn = draw(facts, _write, seed=1, n_forget=6, n_retain=8)
    assert len(drawn.forget) == 2 * OF_A_RELATION
    assert len({fact.subject for fact in drawn.forget}) == 6
    assert all(
        int(fact.subject[4:]) % 2 == 0 for fact in drawn.forget if fact.relation == "capital" and fact.subject
    )
    rows = {row: [one for one in drawn.asked if one.row == row] for row in ROWS}
    assert all(rows.values()), {row: len(asked) for row, asked in rows.items()}
    given = {fact.prompt for fact in (*drawn.forget, *drawn.retain)}
    for row in ROWS[1:]:
        assert not given & {one.prompt for one in rows[row]}
    known = dict(
        zip((one.prompt for one in drawn.asked), _write([one.prompt for one in drawn.asked]), strict=True)
    )
    assert all(one.target.strip() in known[one.prompt] for one in drawn.asked)
    sides = Grid.of(drawn.forget, drawn.retain, 1)
    forgotten = {fact.subject for fact in drawn.forget}
    kept = {(fact.subject, fact.relation) for fact in drawn.retain}
    for one in rows["same_relation"]:
        relation = "capital" if "capital" in one.prompt else "language"
        subject = next(word for word in one.prompt.split() if word.startswith("Land"))
        assert subject not in forgotten and (subject, relation) not in kept
        assert sides.way_side(relation, one.prompt.replace(subject, "{}")) == "judge"


def test_a_draw_depends_on_its_seed_alone() -> None:
    assert draw(_facts(), _write, 3, 6, 8) == draw(_facts(), _write, 3, 6, 8)
    assert draw(_facts(), _write, 3, 6, 8).forget != draw(_facts(), _write, 4, 6, 8).forget


def test_ways_are_divided_as_the_grid_divides_them() -> None:
    drawn = draw(_facts(), _write, seed=1, n_forget=6, n_retain=8)
    grid = Grid.of(drawn.forget, (), 1)
    for one in drawn.asked:
        if one.row == "unseen_way":
            fact = next(fact for fact in drawn.forget if fact.id == one.fact)
            template = one.prompt.replace(fact.subject or "", "{}")
            assert grid.way_side(fact.relation or "", template) == "judge"


def test_the_first_word_that_can_be_right() -> None:
    assert first_word(" the city of Paris, in France") == " Paris"
    assert first_word(' "Kyoto" and') == " Kyoto"
    assert first_word(" a country\nParis") == ""


def test_the_table_has_a_row_for_each_arm() -> None:
    one = {row: [0.5, 0.25, 0.75, 4] for row in ROWS} | {"text_kl": 0.01, "edit_s": 60.0}
    other = {row: [0.7, 0.5, 0.9, 4] for row in ROWS} | {
        "text_kl": 0.03,
        "edit_s": 62.0,
        "lens": 0.1,
        "back": 0.0,
    }
    lines = table({"a": [one, other], "b": [{**one, "same_subject": None}]}).splitlines()
    assert lines[2].startswith("| a | 0.60 [0.25, 0.90] |")
    assert lines[2].endswith("| 0.02 | 0.1 | 0 | 61 |")
    assert "|  |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
