"""Budgets and masks from scores; every expected choice is read off the scores by eye."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locus.errors import InputError
from locus.scores import LayerScores, NeuronScores, count_of
from tests.tiny import tiny_model


def _scores(values=None):
    model = tiny_model("llama")
    atlas = model.atlas
    if values is None:
        values = torch.arange(atlas.n_layers * atlas.d_mlp, dtype=torch.float32).view(
            atlas.n_layers, atlas.d_mlp
        )
    return NeuronScores(values, "test", model.fingerprint, atlas, {"a": 1})


@pytest.mark.parametrize(
    ("budget", "n", "expected"),
    [
        ("1%", 1000, 10),
        (0.01, 1000, 10),
        ("0.5", 10, 5),
        (3, 10, 3),
        ("7", 10, 7),
        (1.0, 10, 10),
        ("0.01%", 10, 1),
    ],
)
def test_a_budget_is_a_fraction_or_a_count(budget, n, expected):
    assert count_of(budget, n) == expected


@pytest.mark.parametrize("budget", ["x", "0", 0, -1, "-1%", 11, 1.5, "101%", "nan", ""])
def test_a_budget_that_means_nothing_is_refused(budget):
    with pytest.raises(InputError, match="budget"):
        count_of(budget, 10)


@given(st.floats(min_value=1e-6, max_value=1.0), st.integers(min_value=1, max_value=10**7))
def test_a_fraction_chooses_at_least_one_and_at_most_all(fraction, n):
    assert 1 <= count_of(fraction, n) <= n


def test_the_highest_scores_are_chosen():
    scores = _scores()
    chosen = scores.choose(3)
    assert chosen.flatten().nonzero().flatten().tolist() == list(range(chosen.numel() - 3, chosen.numel()))
    each = scores.choose(2, per_layer=True)
    assert each.sum(dim=1).tolist() == [2] * scores.atlas.n_layers
    assert each[:, -2:].all()


def test_ties_go_to_the_lower_layer_and_neuron():
    scores = _scores(torch.zeros(_scores().values.shape))
    assert scores.choose(2).flatten().nonzero().flatten().tolist() == [0, 1]


def test_a_mask_holds_the_rows_and_columns_of_the_neurons():
    scores = _scores()
    mask = scores.top(1)
    last = scores.atlas.n_layers - 1
    neuron = scores.atlas.d_mlp - 1
    assert set(mask.entries) == {part.param for part in scores.atlas.neurons[last]}
    for part in scores.atlas.neurons[last]:
        selection = mask.entries[part.param]
        assert selection.kind == ("rows" if part.axis == 0 else "columns")
        assert selection.index.tolist() == [part.offset + neuron]
    only_down = scores.top(1, parts=("down",))
    assert [s.kind for s in only_down.entries.values()] == ["columns"]
    with pytest.raises(InputError, match="sideways"):
        scores.top(1, parts=("sideways",))


def test_scores_survive_saving(tmp_path):
    scores = _scores()
    scores.save(tmp_path / "s.safetensors")
    back = NeuronScores.load(tmp_path / "s.safetensors")
    assert torch.equal(back.values, scores.values)
    assert (back.method, back.settings, back.atlas) == (scores.method, scores.settings, scores.atlas)


def test_nan_scores_name_their_layer():
    values = torch.zeros(_scores().values.shape)
    values[1, 0] = float("nan")
    with pytest.raises(InputError, match="layer 1"):
        _scores(values)


def test_top_layers_are_in_order():
    model = tiny_model("llama")
    values = torch.arange(model.atlas.n_layers, dtype=torch.float32)
    chosen = LayerScores(values, "test", model.fingerprint, model.atlas).top_layers(2)
    assert chosen.tolist() == [model.atlas.n_layers - 2, model.atlas.n_layers - 1]
