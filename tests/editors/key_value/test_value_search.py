"""A target of a sentence is judged by the token: one improbable first token is not forgetting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors import MEMIT
from editors.key_value.edit_target import SENTENCE, judged_per_token
from editors.key_value.target_value import find_value_deltas
from locus.fact import Fact
from locus.forward import measure
from locus.model import Model
from tests.editors.direct_edits import QUICK, TEXT, down, facts
from tests.tiny import tiny_model

LONG = Fact(
    id="long",
    prompt="The Eiffel Tower",
    target=" is in the city of Paris and the capital of Germany is Berlin",
    subject="Eiffel Tower",
    alternatives=(" Rome", " French"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


def per_token(model: Model, fact: Fact) -> float:
    scores = measure(model, [fact])
    return float((-scores.nll / scores.n_tokens).exp())


@pytest.mark.parametrize("to", ["alternatives", "refusal", "entropy"])
def test_the_probability_watched_is_that_of_a_token(to: str) -> None:
    model = tiny_model()
    target = replace(QUICK, to=to, steps=1)
    start = find_value_deltas(model, [[LONG]], target, model.atlas.blocks[1], (), "prompt")
    assert start.prob.tolist() == pytest.approx([per_token(model, LONG)], rel=1e-3)
    short = facts()[0]
    (first,) = find_value_deltas(model, [[short]], target, model.atlas.blocks[1], ()).prob.tolist()
    assert first == pytest.approx(float(measure(model, [short]).first_prob[0]), rel=1e-3)


@pytest.mark.parametrize("to", ["alternatives", "refusal"])
def test_an_improbable_first_token_ends_the_search_of_short_targets_only(to: str) -> None:
    """Both first tokens have less than `prob_stop`: done for a word, nothing said of a sentence."""
    model, site = tiny_model(), tiny_model().atlas.blocks[0]
    target = replace(QUICK, to=to, steps=3, loss_stop=0.0, prob_stop=0.99, sentence_stop=0.0)
    assert find_value_deltas(model, [[facts()[0]]], target, site, (), "prompt").steps == 0
    assert find_value_deltas(model, [[LONG]], target, site, (), "prompt").steps == 3
    there = replace(target, sentence_stop=1.0)
    assert find_value_deltas(model, [[LONG]], there, site, (), "prompt").steps == 0


def test_a_sentence_that_is_still_probable_by_the_token_is_not_forgotten() -> None:
    """As a whole it never has more than `forgotten`; an edit that hardly changes it says that it remains."""
    model = tiny_model()
    scores = measure(model, [LONG])
    assert (
        judged_per_token(int(scores.n_tokens))
        and int(scores.n_tokens) > SENTENCE
        and float(scores.prob) < 0.01
    )
    weak = MEMIT(layers=(0, 1), target=replace(QUICK, steps=1, lr=1e-6), rounds=2, place="prompt")
    delta = weak.run(model, [LONG], [], down(model, 0, 1), text=TEXT)
    assert delta.provenance["remaining"] == ["long"]
    assert delta.provenance["rounds"] == {"long": 2}
    with delta.applied(model):
        assert per_token(model, LONG) > 0.5 * per_token(tiny_model(), LONG)


def test_a_short_target_is_judged_as_before() -> None:
    assert not judged_per_token(SENTENCE) and judged_per_token(SENTENCE + 1)
    model = tiny_model()
    found = find_value_deltas(model, [[facts()[0]]], replace(QUICK, steps=1), model.atlas.blocks[1], ())
    assert torch.isfinite(found.delta).all() and found.steps == 1
