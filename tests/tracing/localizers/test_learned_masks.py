import pytest
import torch

from locus.errors import InputError
from locus.fact import Example
from locus.forward import batches, measure
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.localizers.learned_masks import (
    HardConcrete,
    Slimming,
    gated,
    gated_nll,
    hard_concrete,
    open_probability,
)
from tracing.localizers.saliency import GradientSaliency


def test_open_gates_change_nothing_and_shut_ones_silence() -> None:
    model = tiny_model("llama")
    facts = tiny_facts()
    ones = torch.ones(model.atlas.n_layers, model.atlas.d_mlp)
    clean = measure(model, facts).nll
    with gated(model, ones):
        assert torch.equal(measure(model, facts).nll, clean)
    ones[1, 4] = 0
    with gated(model, ones):
        assert not torch.equal(measure(model, facts).nll, clean)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_the_first_gradient_of_the_gates_is_gradient_saliency(arch: str) -> None:
    """d log p / dm at m = 1 is h * d log p / dh summed over positions; NLL here is the mean over target tokens."""
    model = tiny_model(arch)
    facts = [Example("The capital of France is", " Paris"), Example("Rome is", " old")]
    facts = [fact for fact in facts if encode(model, fact).n_target == encode(model, facts[0]).n_target]
    n_target = encode(model, facts[0]).n_target
    encoded = [encode(model, fact) for fact in facts]
    gates = torch.ones(1, model.atlas.n_layers, model.atlas.d_mlp, requires_grad=True)
    gated_nll(model, batches(encoded), len(encoded), gates)
    assert gates.grad is not None
    saliency = GradientSaliency(absolute="never").run(model, facts).values
    torch.testing.assert_close(-gates.grad[0] * n_target, saliency, atol=1e-7, rtol=1e-4)


def test_gate_gradients_do_not_depend_on_batching() -> None:
    model = tiny_model("llama")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    gradients = []
    for max_tokens in (1, 4096):
        gates = torch.ones(1, model.atlas.n_layers, model.atlas.d_mlp, requires_grad=True)
        gated_nll(model, batches(encoded, max_tokens), len(encoded), gates)
        gradients.append(gates.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_hard_concrete_gate_at_known_draws() -> None:
    """u = 1/2 and s = 0: sigmoid(0) = 1/2, stretched to 1.2 / 2 - 0.1 = 0.5; extreme draws are clipped."""
    location = torch.zeros(3)
    gates = hard_concrete(location, torch.tensor([0.5, 1e-6, 1 - 1e-6]), 2 / 3)
    torch.testing.assert_close(gates, torch.tensor([0.5, 0.0, 1.0]))


def test_open_probability_is_the_share_of_open_gates() -> None:
    location = torch.tensor([-1.0, 0.0, 2.0]).repeat(400_000, 1)
    uniform = torch.rand(location.shape, generator=torch.Generator().manual_seed(0))
    share = (hard_concrete(location, uniform, 2 / 3) > 0).float().mean(0)
    torch.testing.assert_close(open_probability(location[0], 2 / 3), share, atol=0.005, rtol=0)


@pytest.mark.parametrize(
    "localizer", [Slimming(steps=60, penalty=3.0, stop=0.1), HardConcrete(steps=80, penalty=3.0, stop=0.1)]
)
def test_open_gates_keep_the_target_better_than_as_many_others(localizer: Slimming | HardConcrete) -> None:
    model = tiny_model("llama")
    facts = tiny_facts()
    result = localizer.run(model, facts)
    assert float(result.values.min()) >= 0 and float(result.values.max()) <= 1
    assert float(result.values.std()) > 0.01
    kept = result.choose(0.5)
    shuffled = torch.randperm(kept.numel(), generator=torch.Generator().manual_seed(0))
    with gated(model, kept.float()):
        chosen_nll = measure(model, facts).nll.mean()
    with gated(model, kept.flatten()[shuffled].view_as(kept).float()):
        random_nll = measure(model, facts).nll.mean()
    assert chosen_nll < random_nll


def test_seeds_decide_the_draws() -> None:
    model = tiny_model("gpt2")
    runs = [HardConcrete(steps=3, seed=seed).run(model, tiny_facts()).values for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("localizer", [Slimming(steps=6, penalty=20.0), HardConcrete(steps=6, penalty=20.0)])
def test_masks_side_by_side_are_those_of_each_fact_alone(
    arch: str, localizer: Slimming | HardConcrete
) -> None:
    model, facts = tiny_model(arch), tiny_facts()
    together = localizer.run_each(model, facts, batch_tokens=40)
    for fact, scores in zip(facts, together, strict=True):
        alone = localizer.run(model, [fact])
        torch.testing.assert_close(scores.values, alone.values, atol=2e-5, rtol=1e-4)
        assert scores.settings == alone.settings
    assert not torch.allclose(together[0].values, together[1].values, atol=1e-3)


def test_a_mask_stays_as_it_was_when_few_gates_were_left() -> None:
    """Pushed by the penalty alone, every gate falls by the learning rate a step: below 0.75 after three of 0.1."""
    model, facts = tiny_model("llama"), tiny_facts()
    path = list(Slimming(penalty=1e6, learning_rate=0.1, stop=0.75).path(model, facts))
    assert len(path) == 3
    torch.testing.assert_close(path[-1], torch.full_like(path[-1], 0.7), atol=1e-4, rtol=0)


def test_no_steps_are_refused() -> None:
    with pytest.raises(InputError, match="steps is 0"):
        Slimming(steps=0).run(tiny_model("llama"), tiny_facts())
