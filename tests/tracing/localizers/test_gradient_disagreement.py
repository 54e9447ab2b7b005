import dataclasses
import statistics

import pytest
import torch

from locus.errors import InputError
from tests.tiny import tiny_facts, tiny_model
from tracing.localizers.gradient_disagreement import (
    ContrastiveVectors,
    DisagreeingTensors,
    UnitScores,
    _cosine,
    alternatives_of,
)
from tracing.localizers.weight_saliency import mean_gradients

RETAIN = [fact.neighbours[0] for fact in tiny_facts()]


def test_cosine_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[0.0, 2.0], [-3.0, -3.0], [1.0, 0.0]])
    torch.testing.assert_close(_cosine(a, b, 1), torch.tensor([0.0, -1.0, 1.0]))


@pytest.mark.parametrize("units", ["rows", "columns"])
def test_the_vectors_that_agree_least_are_chosen(units: str) -> None:
    model = tiny_model("llama")
    facts = tiny_facts()
    name = "model.layers.1.mlp.up_proj.weight"
    parameters = {name: model.module.get_parameter(name)}
    target = mean_gradients(model, facts, parameters)[name]
    other = mean_gradients(model, alternatives_of(facts), parameters)[name]
    dim = 1 if units == "rows" else 0
    cosine = torch.nn.functional.cosine_similarity(target, other, dim=dim)
    scores = ContrastiveVectors(units=units, parameters=(name,)).run(model, facts)  # type: ignore[arg-type]
    torch.testing.assert_close(scores.values[name], -cosine, rtol=1e-4, atol=1e-6)
    selection = scores.top(3).entries[name]
    assert selection.kind == units
    assert (
        bool(selection.touched(1 - dim)[cosine.argsort()[:3]].all()) and selection.n == 3 * target.shape[dim]
    )


def test_without_alternatives_a_retain_set_is_needed() -> None:
    model = tiny_model("gpt2")
    bare = [dataclasses.replace(fact, alternatives=()) for fact in tiny_facts()]
    with pytest.raises(InputError, match="retain set"):
        ContrastiveVectors().run(model, bare)
    assert ContrastiveVectors().run(model, bare, RETAIN).top("1%").n_weights > 0


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_disagreeing_tensors_pass_both_limits(arch: str) -> None:
    """Each limit halfway through the tensors, so that either alone would keep others."""
    model = tiny_model(arch)
    parameters = dict(model.module.named_parameters())
    one = mean_gradients(model, tiny_facts(), parameters)
    other = mean_gradients(model, RETAIN, parameters)
    cosines = {
        name: float(torch.nn.functional.cosine_similarity(one[name].flatten(), other[name].flatten(), dim=0))
        for name in parameters
        if bool(one[name].any())
    }
    sizes = {name: float(one[name].abs().mean()) for name in parameters}
    limits = statistics.median(cosines.values()) + 1e-6, statistics.median(sizes.values()) * 1.0001
    differing = {name for name, cosine in cosines.items() if cosine < limits[0]}
    large = {name for name, size in sizes.items() if size > limits[1]}
    localizer = DisagreeingTensors(cosine=limits[0], magnitude=limits[1])
    mask = localizer.run(model, tiny_facts(), RETAIN).above_threshold(1.0)
    assert set(mask.entries) == differing & large
    assert differing - large and large - differing and differing & large
    assert all(selection.kind == "all" for selection in mask.entries.values())
    mask.check(model)


def test_disagreeing_tensors_refuse() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="disagreeing-tensors"):
        DisagreeingTensors().run(model, tiny_facts())
    with pytest.raises(InputError, match="no score is above"):
        DisagreeingTensors(cosine=2.0).run(model, tiny_facts(), RETAIN).above_threshold(1e9)


def test_saved_scores_come_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    scores = ContrastiveVectors().run(tiny_model("gpt2"), tiny_facts())
    scores.save(tmp_path / "scores.safetensors")
    again = UnitScores.load(tmp_path / "scores.safetensors")
    assert again.top("2%").digest == scores.top("2%").digest
    assert again.settings == {"units": "rows", "parameters": ["*"]} and again.shapes == dict(scores.shapes)
