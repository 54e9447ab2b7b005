"""Guesses in place of answers: which are drawn, how far a model is from them, and that edits bring them about."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors import MEMIT, ROME
from editors.key_value.distractors import FEWEST, facts_for, own_guesses, with_others
from editors.key_value.target_value import find_value_deltas
from editors.key_value.value_search import Guesses
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import measure
from locus.model import Model
from locus.tokens import encode
from tests.editors.direct_edits import ARCHITECTURES, QUICK, TEXT, down, facts, untouched
from tests.tiny import tiny_model

GUESS = replace(QUICK, to="alternatives", lr=0.2, clamp=4.0, steps=40, decay=0.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


def capital(name: str, answer: str, relation: str | None = "capital", **more: object) -> Fact:
    return Fact(id=name, prompt=f"{name} is", target=answer, relation=relation, **more)  # type: ignore[arg-type]


POOL = [
    capital("a", " Rome"),
    capital("b", " Paris"),
    capital("c", " Paris"),
    capital("d", " Oslo"),
    capital("e", " Lima"),
    capital("f", " red", "colour"),
    capital("g", " blue", "colour"),
]


def test_answers_of_the_relation_come_first_and_never_the_own() -> None:
    (rome,) = with_others(POOL[:1], POOL)
    assert sorted(rome.alternatives) == [" Lima", " Oslo", " Paris"]
    (red,) = with_others(POOL[5:6], POOL)
    assert red.alternatives[0] == " blue" and len(red.alternatives) == FEWEST
    assert set(red.alternatives[1:]) <= {" Rome", " Paris", " Oslo", " Lima"}


def test_own_alternatives_stay_and_are_only_filled_up() -> None:
    own = capital("a", " Rome", alternatives=(" Bern", " Kiel", " Bonn", " Graz"))
    assert with_others([own], POOL) == [own]
    (one,) = with_others([replace(own, alternatives=(" Bern",))], POOL)
    assert one.alternatives[0] == " Bern" and len(one.alternatives) == FEWEST
    assert with_others(POOL[:1], POOL[:1]) == POOL[:1]  # nobody to ask


def test_facts_without_a_relation_are_near_nobody() -> None:
    lone = capital("x", " six", None)
    (found,) = with_others([lone], [lone, capital("y", " ten", None), *POOL])
    assert len(found.alternatives) == FEWEST and " six" not in found.alternatives


def test_the_draw_depends_on_seed_and_fact_not_on_the_pools_order() -> None:
    many = [capital(f"n{i}", f" city{i}") for i in range(30)]
    first = with_others(many[:2], many)
    assert first == with_others(many[:2], many[::-1])
    assert first[0].alternatives != first[1].alternatives
    assert first != with_others(many[:2], many, seed=1)


def test_divergence_by_hand() -> None:
    """Two guesses against a uniform model: log(d_vocab / 2); unused places weigh nothing; 0 where they agree."""
    guesses = Guesses(torch.tensor([[1, 3], [2, 2]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    even = guesses.divergence(torch.zeros(2, 8), torch.tensor([0, 1]))
    assert even.tolist() == pytest.approx([math.log(4), math.log(8)])
    agreed = torch.full((1, 8), -100.0)
    agreed[0, [1, 3]] = 0.0
    assert float(guesses.divergence(agreed, torch.tensor([0]))) == pytest.approx(0.0, abs=1e-5)


def distance(model: Model, fact: Fact) -> float:
    """KL(uniform over the first tokens of the fact's alternatives || model), from one probability after the other."""
    right = encode(model, fact).target_ids[0]
    first = {encode(model, wrong).target_ids[0]: wrong for wrong in wrongs(fact)}
    first.pop(right, None)
    probs = measure(model, list(first.values())).first_prob
    return float(-probs.log().mean()) - math.log(len(first))


def wrongs(fact: Fact) -> list[Fact]:
    """The fact with each of its wrong answers."""
    return [replace(fact, target=wrong) for wrong in fact.alternatives]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_states_found_guess_and_are_written(arch: str) -> None:
    """The loss starts at the distance from the guesses, falls, and the edit brings about the states it fell to."""
    model, two = tiny_model(arch), facts()[:2]
    aimed = with_others(two, facts())
    before = [distance(model, fact) for fact in aimed]
    groups = [[fact] for fact in aimed]
    start = find_value_deltas(model, groups, replace(GUESS, steps=1), model.atlas.blocks[1], ())
    assert start.loss.tolist() == pytest.approx(before, rel=1e-4)
    with untouched(model):
        delta = MEMIT(layers=(0, 1), target=GUESS, weight=1e-6).run(
            model, two, facts()[2:], down(model), text=TEXT
        )
    after = [delta.provenance["losses"][fact.id] for fact in two]
    assert all(now < 0.9 * then for now, then in zip(after, before, strict=True))
    if arch != "gemma2":  # a norm's output has a length of its own
        assert max(delta.provenance["missing"].values()) < 0.02


def test_rome_takes_the_same_aim() -> None:
    model, fact = tiny_model(), facts()[0]
    (aimed,) = with_others([fact], facts())
    delta = ROME(layer=1, target=GUESS).run(model, [fact], facts()[1:], down(model), text=TEXT)
    assert delta.provenance["losses"][fact.id] < 0.9 * distance(model, aimed)


def test_nothing_to_guess_is_refused() -> None:
    model, fact = tiny_model(), replace(facts()[0], alternatives=())
    rewrite = replace(GUESS, to="rewrite")
    with pytest.raises(InputError, match="has no alternatives"):
        ROME(layer=1, target=rewrite).run(model, [fact], [], down(model), text=TEXT)
    with pytest.raises(InputError, match="begins with the token"):
        Guesses.of(model, [replace(fact, alternatives=(fact.target,))])


def test_nothing_is_drawn_that_begins_as_the_answer_or_is_true_of_the_subject() -> None:
    model = tiny_model()
    fact = Fact(id="x", prompt="The Eiffel Tower is in", target=" Paris", subject="Eiffel Tower")
    same = Fact(id="s", prompt="the eiffel tower is not in", target=" Berlin", subject="eiffel tower")
    twin = Fact(id="t", prompt="It is in", target=" Paris is", subject="It")
    other = Fact(id="o", prompt="Truffaut speaks", target=" French", subject="Truffaut")
    (found,) = facts_for(model, GUESS, [fact], [same, twin, other])
    assert found.alternatives == (" French",)
    held_out = replace(other, held_out=True)
    (alone,) = facts_for(model, GUESS, [fact], [held_out])
    assert " French" not in alone.alternatives or alone.alternatives == own_guesses(model, fact)


def test_one_fact_alone_is_edited_with_the_models_own_guesses() -> None:
    """Neither alternatives nor other facts: the default of `locus edit` works all the same."""
    model, fact = tiny_model(), replace(facts()[0], alternatives=())
    guesses = own_guesses(model, fact)
    firsts = [encode(model, replace(fact, target=guess)).target_ids[0] for guess in guesses]
    assert len(set(firsts)) == FEWEST and encode(model, fact).target_ids[0] not in firsts
    assert not any(guess.strip().lower() == fact.target.strip().lower() for guess in guesses)
    before = distance(model, replace(fact, alternatives=guesses))
    delta = ROME(layer=1, target=GUESS).run(model, [fact], [], down(model), text=TEXT)
    assert delta.provenance["losses"][fact.id] < 0.9 * before
