"""Rewordings keep the fact and use nothing that judges it."""

from __future__ import annotations

import dataclasses

import pytest

from editors.editor import EditData
from editors.objectives.ga import GA
from editors.training.data import Data
from editors.training.retain import Retain
from editors.training.rewording import CONTEXT_PREFIXES, FRAMES, encoded_rewordings, rewordings
from editors.training.settings import Training
from editors.two_stage.whp import WHP
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.mask import WeightMask, shapes_of
from tests.tiny import tiny_facts, tiny_model

FACT = Fact(
    "paris",
    "The Eiffel Tower is in",
    " Paris",
    subject="Eiffel Tower",
    subject_start=4,
    paraphrases=("Go up the Eiffel Tower in",),
    neighbours=(Example("The Colosseum is in", " Rome"),),
)


def test_every_prefix_and_every_frame_once() -> None:
    reworded = rewordings(FACT)
    assert len(reworded) == len(CONTEXT_PREFIXES) + len(FRAMES)
    assert len({fact.id for fact in reworded}) == len({fact.prompt for fact in reworded}) == len(reworded)
    assert reworded[0].prompt == "As we know, The Eiffel Tower is in"
    assert "Eiffel Tower:" in {fact.prompt for fact in reworded}
    assert {fact.target for fact in reworded} == {" Paris"}
    assert not any(fact.paraphrases or fact.neighbours for fact in reworded)


def test_a_fact_without_a_subject_has_prefixs_only() -> None:
    assert len(rewordings(dataclasses.replace(FACT, subject=None, subject_start=None))) == len(
        CONTEXT_PREFIXES
    )


def test_the_audits_own_prompts_are_not_among_them() -> None:
    from locus.audit.attacks.prompts import JAILBREAKS, TEMPLATES

    assert not {prefix.strip() for prefix in CONTEXT_PREFIXES} & {prompt.strip() for prompt in JAILBREAKS}
    assert not {prefix + "{}" for prefix in CONTEXT_PREFIXES} & set(TEMPLATES)
    assert not {fact.prompt for fact in rewordings(FACT)} & {FACT.prompt, *FACT.paraphrases}


def test_a_long_id_still_names_a_file() -> None:
    assert all(len(fact.id) <= 120 for fact in rewordings(dataclasses.replace(FACT, id="x" * 120)))


def test_targets_stay_whole_tokens() -> None:
    model = tiny_model("smollm")
    facts, encoded = encoded_rewordings(model, tiny_facts())
    assert len(facts) == len(encoded) > 0
    for fact, one in zip(facts, encoded, strict=True):
        assert model.tokenizer.decode(one.target_ids) == fact.target


def test_a_step_draws_as_many_as_asked_and_none_by_default() -> None:
    model, retain = tiny_model("smollm"), Retain(term="none")
    for n in (0, 5):
        training = Training(reworded=n)
        data = Data.read(model, EditData(tiny_facts()), retain, training)
        drawn = [i for batch in data.reworded_batches(training, 0) for i in batch.examples]
        assert len(drawn) == len(set(drawn)) == n


def test_reworded_examples_are_pushed_too() -> None:
    """The same run with rewordings ends elsewhere."""
    model = tiny_model("smollm", num_hidden_layers=2)
    mask = WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))
    settings = Training(steps=2, goal=0.0, floor=0.0, utility=0.0, lr=1e-3)
    plain = GA(training=settings).run(model, tiny_facts(), [], mask)
    both = GA(training=dataclasses.replace(settings, reworded=4)).run(model, tiny_facts(), [], mask)
    assert any((plain.changes[n].new != both.changes[n].new).any() for n in plain.changes)


def test_whp_refuses_them() -> None:
    with pytest.raises(InputError, match="reworded"):
        WHP(training=Training(reworded=4))
