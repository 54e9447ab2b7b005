import dataclasses

import pytest
import torch

from locus.errors import InputError
from locus.scores import NeuronScores
from tests.tiny import tiny_model
from tracing.score_algebra import minus, normalize, rank_average

MODEL = tiny_model("llama")


def scores(*first: float, fingerprint: str = "a") -> NeuronScores:
    """Scores that begin with these in layer 0; all others are -1."""
    values = torch.full((MODEL.atlas.n_layers, MODEL.atlas.d_mlp), -1.0)
    values[0, : len(first)] = torch.tensor(first)
    return NeuronScores(values, "made-up", fingerprint, MODEL.atlas)


def test_ranks_run_from_nought_to_one_with_ties_at_their_mean() -> None:
    """Of 144 scores 141 tie at -1: places 0 to 140, mean 70; then 141, 142, 143."""
    ranked = normalize(scores(3.0, 1.0, 7.0)).values
    n = ranked.numel()
    expected = [142 / 143, 141 / 143, 1.0, 70 / 143]
    assert n == 144
    assert ranked[0, :4].tolist() == pytest.approx(expected)


def test_scales_by_hand() -> None:
    one = scores(3.0)
    assert float(normalize(one, "max").values[0, 0]) == 1.0
    z = normalize(one, "z", per_layer=True).values
    assert float(z[0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(z[0].std(unbiased=False)) == pytest.approx(1, rel=1e-5)
    assert bool((z[1] == 0).all())


def test_rank_average_is_the_mean_of_ranks() -> None:
    a, b = scores(1.0, 2.0, 3.0), scores(3.0, 2.0, 1.0)
    mean = rank_average([a, b]).values
    torch.testing.assert_close(mean, (normalize(a).values + normalize(b).values) / 2)
    torch.testing.assert_close(rank_average([a, b], [3.0, 0.0]).values, normalize(a).values)


def test_minus() -> None:
    assert minus(scores(5.0), scores(2.0), 2.0).values[0, :2].tolist() == [1.0, 1.0]


def test_scores_of_different_models_are_refused() -> None:
    with pytest.raises(InputError, match="different models"):
        minus(scores(1.0), dataclasses.replace(scores(1.0), fingerprint="b"))
    with pytest.raises(InputError, match="no scores"):
        rank_average([])
    with pytest.raises(InputError, match="2 weights for 1"):
        rank_average([scores(1.0)], [1.0, 2.0])


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0)])
def test_weights_that_are_no_mean_are_refused_as_such(weights: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="a mean takes weights of 0 or more"):
        rank_average([scores(1.0), scores(2.0)], weights)


def test_robust_z_of_mostly_equal_scores_is_finite_and_keeps_the_order() -> None:
    scaled = normalize(scores(3.0, 1.0, 7.0), "robust-z").values
    assert torch.isfinite(scaled).all()
    assert scaled[0, 2] > scaled[0, 0] > scaled[0, 1] > scaled[0, 3]
