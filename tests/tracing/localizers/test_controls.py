import pytest
import torch

from locus.errors import InputError
from tests.tiny import tiny_model
from tracing.localizers.activation_norm import down_norms
from tracing.localizers.controls import AllNeurons, LargestNorm, RandomLayers, RandomNeurons


def test_random_neurons_follow_the_seed() -> None:
    model = tiny_model("llama")
    first, again, other = (RandomNeurons(seed=s).run(model).values for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_neurons_keep_a_layer_profile_exactly() -> None:
    model = tiny_model("llama")
    profile = [0] * model.atlas.n_layers
    profile[0], profile[-1] = 3, 5
    scores = RandomNeurons(seed=4, profile=tuple(profile)).run(model)
    chosen = scores.choose(sum(profile))
    assert chosen.sum(1).tolist() == profile
    other = RandomNeurons(seed=5, profile=tuple(profile)).run(model).choose(sum(profile))
    assert not torch.equal(chosen, other)


def test_a_profile_of_another_model_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="does not fit"):
        RandomNeurons(profile=(1,) * (model.atlas.n_layers + 1)).run(model)
    with pytest.raises(InputError, match="does not fit"):
        RandomNeurons(profile=(model.atlas.d_mlp + 1,) + (0,) * (model.atlas.n_layers - 1)).run(model)


def test_random_layers_fill_whole_layers_first() -> None:
    model = tiny_model("gpt2")
    chosen = RandomLayers(n_layers=1, seed=0).run(model).choose(model.atlas.d_mlp)
    assert sorted(chosen.sum(1).tolist())[-1] == model.atlas.d_mlp
    drawn = {int(RandomLayers(seed=s).run(model).values.sum(1).argmax()) for s in range(20)}
    assert len(drawn) > 1
    with pytest.raises(InputError, match="n_layers"):
        RandomLayers(n_layers=99).run(model)


def test_largest_norm_ranks_by_the_down_column() -> None:
    model = tiny_model("phi3")
    assert torch.equal(LargestNorm().run(model).values, down_norms(model))


def test_all_neurons_with_the_whole_budget_takes_everything() -> None:
    model = tiny_model("llama")
    assert bool(AllNeurons().run(model).choose("100%").all())


def test_two_controls_of_one_seed_draw_apart() -> None:
    model = tiny_model("llama", intermediate_size=400)
    one, other = RandomNeurons().run(model).values, RandomLayers().run(model).values % 1
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.1
