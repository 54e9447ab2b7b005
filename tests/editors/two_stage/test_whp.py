"""Who's Harry Potter: anchors align, targets are the generic prediction, repeated anchors are left out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editors.training.settings import Training
from editors.two_stage.anchored_terms import Anchors
from editors.two_stage.reinforcement import Reinforce
from editors.two_stage.whp import NO_LABEL, WHP, generic_logits
from locus.errors import InputError
from locus.forward import batches, label_logits
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from locus.tokens import Encoded, encode
from tests.tiny import tiny_facts, tiny_model


def mlp_mask(model: Model) -> WeightMask:
    return WeightMask.of_parameters(["*.mlp.*"], shapes_of(model.module))


def test_tokens_find_their_partners_around_a_replaced_name() -> None:
    model = tiny_model("smollm")
    fact = dataclasses.replace(
        tiny_facts()[0], prompt="The Eiffel Tower is in", target=" Paris", subject=None
    )
    one = encode(model, fact)
    found = Anchors.read(["Eiffel Tower=city"]).translate(model, one)
    assert "".join(found.encoded.tokens[1:]) == "The city is in Paris"
    for index, partner in enumerate(found.partner):
        if partner is not None and one.tokens[index] in (" is", " in", " Paris"):
            assert found.encoded.tokens[partner] == one.tokens[index]
    assert found.partner[-1] is not None
    assert not found.repeated


def test_without_anchors_every_token_is_its_own_partner() -> None:
    model = tiny_model("smollm")
    one = encode(model, tiny_facts()[2])
    found = Anchors.read([]).translate(model, one)
    assert found.encoded.ids == one.ids
    aligned = [i == p for i, p in enumerate(found.partner) if p is not None]
    assert all(aligned) and len(aligned) > len(one.ids) / 2


def test_the_second_time_an_anchor_is_left_out_and_its_counterpart_lowered() -> None:
    model = tiny_model("smollm")
    fact = dataclasses.replace(tiny_facts()[0], prompt="The city of Rome is in", target=" Rome", subject=None)
    found = Anchors.read(["Rome=Berlin"]).translate(model, encode(model, fact))
    n = len(found.partner)
    assert n - 1 in found.repeated
    assert len(found.counterparts) == 1
    first = model.tokenizer(" Berlin", add_special_tokens=False).input_ids[0]
    assert found.counterparts_before(n - 1) == [first]
    assert found.counterparts_before(1) == []


@pytest.mark.parametrize("pair", ["Rome", "=Berlin", "Rome= "])
def test_a_pair_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(InputError, match="TERM=COUNTERPART"):
        WHP(anchors=(pair,))


def test_targets_are_the_argmax_of_the_generic_logits() -> None:
    """Against the plain formula on whole sequences, where no anchor shifts anything."""
    model = tiny_model("smollm")
    facts = tiny_facts()[:2]
    few = Training(steps=3, lr=0.05, floor=0.0, goal=0.0, utility=0.0)
    reinforced = Reinforce(training=few).run(model, facts, (), mlp_mask(model))
    labels = WHP().targets(model, facts, reinforced)
    for fact, row in zip(facts, labels, strict=True):
        one = encode(model, fact)
        (batch,) = batches([Encoded(one.ids, one.target_start, None, one.tokens)])
        with torch.no_grad():
            base = label_logits(model, batch)
            with reinforced.applied(model):
                raised = label_logits(model, batch)
        assert row == tuple(generic_logits(base, raised, 5.0).argmax(-1).tolist())
        assert all(label != target for label, target in zip(row[:1], one.target_ids[:1], strict=True))


def test_a_repeated_anchor_in_the_target_gets_no_label() -> None:
    model = tiny_model("smollm")
    fact = dataclasses.replace(tiny_facts()[0], prompt="The city of Rome is in", target=" Rome", subject=None)
    few = Training(steps=1, lr=0.01, floor=0.0, goal=0.0, utility=0.0)
    reinforced = Reinforce(training=few).run(model, [fact], (), mlp_mask(model))
    (row,) = WHP(anchors=("Rome=Berlin",)).targets(model, [fact], reinforced)
    assert set(row) == {NO_LABEL}


def test_targets_do_not_depend_on_how_many_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("smollm")
    facts = tiny_facts()
    few = Training(steps=1, lr=0.05, floor=0.0, goal=0.0, utility=0.0)
    reinforced = Reinforce(training=few).run(model, facts, (), mlp_mask(model))
    together = WHP().targets(model, facts, reinforced)
    monkeypatch.setattr("editors.two_stage.whp._MOST_BYTES", 1)
    assert WHP().targets(model, facts, reinforced) == together and len(together) == len(facts)
