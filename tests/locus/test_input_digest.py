"""The same inputs have the same digests, and each of them that changes is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.input_digest import (
    WITHOUT_EFFECT,
    differing,
    digest_of,
    fact_digests,
    input_digests,
    model_digests,
    refuse_changed,
)
from tests.tiny import tiny_model

FACT = Fact(
    "a", "The Eiffel Tower is in the city of", " Paris", subject="Eiffel Tower", source="here, line 1"
)
OTHER = {
    "id": "b",
    "prompt": "Once the Eiffel Tower is in the city of",
    "target": " Rome",
    "subject": "Tower",
    "subject_start": 4,
    "relation": "city",
    "paraphrases": ("Where is it? In",),
    "neighbours": (Example("Rome is in", " Italy"),),
    "alternatives": (" Berlin",),
    "paraphrased_target": " the city of Paris",
    "held_out": True,
    "running_text": True,
    "source": "there, line 9",
}
"""Another value of every field."""


def test_another_value_is_known_of_every_field():
    assert set(OTHER) == {field.name for field in dataclasses.fields(Fact)}


@pytest.mark.parametrize("name", OTHER)
def test_each_field_of_a_fact_counts_but_where_it_was_read(name):
    changed = dataclasses.replace(FACT, **{name: OTHER[name]})
    before, now = fact_digests([FACT]), fact_digests([changed])
    assert differing(before, now) == ([] if name in WITHOUT_EFFECT[Fact] else [name])
    assert (digest_of(FACT) == digest_of(changed)) == (name == "source")


def test_the_order_of_facts_counts():
    other = dataclasses.replace(FACT, id="b")
    assert differing(fact_digests([FACT, other]), fact_digests([other, FACT])) == ["id"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights", lambda m: dataclasses.replace(tiny_model("llama", seed=1))),
        ("configuration", lambda m: _configured(m, rms_norm_eps=0.25)),
        ("dtype", lambda m: _in_bfloat16(m)),
        ("attention implementation", lambda m: _attending(m)),
        ("beginning-of-sequence token", lambda m: dataclasses.replace(m, bos=7)),
        ("chat form", lambda m: dataclasses.replace(m, chat=True)),
        ("tokenizer", lambda m: _with_a_token(m)),
    ],
)
def test_each_part_of_a_model_counts(name, change):
    model = tiny_model("llama")
    before = model_digests(model)
    assert name in before and model_digests(tiny_model("llama")) == before
    changed = differing(before, model_digests(change(tiny_model("llama"))))
    # In memory the weights' digest covers their dtype as well.
    assert changed == (["weights", "dtype"] if name == "dtype" else [name])


def _configured(model, **changes):
    for key, value in changes.items():
        setattr(model.module.config, key, value)
    return model


def _in_bfloat16(model):
    model.module.to(torch.bfloat16)
    return model


def _attending(model):
    model.module.set_attn_implementation("eager")
    return model


def _with_a_token(model):
    model.tokenizer.add_tokens(["Colosseum"])
    return model


def test_a_padded_call_leaves_the_tokenizer_the_same():
    model = tiny_model("llama")
    before = model_digests(model)
    model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    model.tokenizer(["Rome", "Rome is in Italy"], padding=True, truncation=True, max_length=3)
    assert model_digests(model)["tokenizer"] == before["tokenizer"]


@dataclasses.dataclass(frozen=True)
class _Inner:
    lr: float = 1.0
    folder: Path = Path("a")


@dataclasses.dataclass(frozen=True)
class _Method:
    training: _Inner = _Inner()
    layers: tuple[int, ...] = (1, 2)


def test_settings_are_named_at_any_depth():
    model = tiny_model("llama")
    before = input_digests(model, settings=_Method(), text=["one"], mask="m")
    now = input_digests(model, settings=_Method(_Inner(lr=2.0), (1,)), text=["two"], mask="m")
    assert differing(before, now) == ["settings: training: lr", "settings: layers", "text"]


def test_values_of_other_types_are_not_equal():
    values = [1, 1.0, "1", True, None, [1], {"1": 1}, {1: 1}, torch.tensor(1), torch.tensor(1.0)]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of((1, 2)) == digest_of([1, 2])
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="function"):
        digest_of(test_values_of_other_types_are_not_equal)


def test_other_inputs_are_refused_by_name():
    refuse_changed("out holds an edit", {"a": "1"}, {"a": "1"})
    with pytest.raises(
        InputError, match=r"out holds an edit made with other inputs \(facts: prompt, b\): give"
    ):
        refuse_changed("out holds an edit", {"facts": {"prompt": "1"}}, {"facts": {"prompt": "2"}, "b": "3"})
    with pytest.raises(InputError, match="does not say what it was made from"):
        refuse_changed("out holds an edit", None, {"a": "1"})
