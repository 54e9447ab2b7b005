"""The cheapest change of values that takes the same from every target: its equations, its cost, its first order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors.key_value.key_positions import row
from editors.key_value.least_squares import SecondMomentMetric, within
from editors.key_value.neuron_parts import located_values, neuron_mask
from editors.key_value.second_moments import second_moments
from editors.key_value.value_slopes import value_slopes
from editors.neurons.neuron_descent import NeuronDescent, cheapest
from locus.errors import InputError
from locus.forward import collate, label_logits, label_nll, measure
from locus.model import Model
from tests.editors.direct_edits import ARCHITECTURES, TEXT, down, facts, untouched
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


def double(arch: str) -> Model:
    model = tiny_model(arch)
    model.module.double()
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_slopes_are_autograds_gradient_of_the_weight(arch: str) -> None:
    model, three = double(arch), facts()
    rows = [row(model, fact, i, "prompt") for i, fact in enumerate(three)]
    slopes = value_slopes(model, rows, [0, 2], lambda one: range(len(one.encoded.ids)))
    for i, fact in enumerate(three):
        assert slopes.logprob[i] == pytest.approx(-float(measure(model, [fact]).nll), rel=1e-4)
        for one in located_values(model, down(model, 0, 2)):
            weight = model.module.get_parameter(one.param).requires_grad_()
            batch = collate([rows[i].encoded], [0])
            (wanted,) = torch.autograd.grad(-label_nll(label_logits(model, batch), batch).sum(), [weight])
            weight.requires_grad_(False)
            got = slopes.gradient(one.layer, i)
            torch.testing.assert_close(one.stored_as(got), wanted.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_forget_facts_lose_the_same_and_retain_facts_nothing(arch: str) -> None:
    """To first order, over all positions and without slack: `nats`, and 0."""
    model, three = double(arch), [replace(fact, held_out=False) for fact in facts()]
    small = 1e-4
    editor = NeuronDescent(where="all", nats=small, prob_stop=1e-30, rounds=1, slack=0.0, prefixes=0)
    before = measure(model, three).nll
    with untouched(model):
        delta = editor.run(model, three[:2], three[2:], down(model), text=TEXT)
    with delta.applied(model):
        lost = (measure(model, three).nll - before) / small
    assert lost.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=0.05)


def test_nothing_that_meets_the_equations_costs_less() -> None:
    model, three = double("llama"), facts()
    located = located_values(model, down(model, 0, 1))
    moments = second_moments(model, [0, 1], TEXT)
    metrics = {layer: SecondMomentMetric.of(moments[layer].mean, 0.01) for layer in (0, 1)}
    rows = [row(model, fact, i, "prompt") for i, fact in enumerate(three)]
    slopes = value_slopes(model, rows, [0, 1], lambda one: range(len(one.encoded.ids)))
    wanted = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)
    updates = cheapest(slopes, located, metrics, wanted)
    gradients = [{layer: slopes.gradient(layer, fact) for layer in (0, 1)} for fact in range(3)]

    def effect(update: dict[int, torch.Tensor]) -> torch.Tensor:
        return torch.stack([sum((g[layer] * update[layer]).sum() for layer in (0, 1)) for g in gradients])  # type: ignore[misc]

    torch.testing.assert_close(effect(updates), wanted, rtol=1e-8, atol=1e-8)
    cost = sum(metrics[layer].cost(updates[layer]) for layer in (0, 1))
    flat = torch.stack([torch.cat([g[0].flatten(), g[1].flatten()]) for g in gradients])
    source = torch.Generator().manual_seed(0)
    for _ in range(5):
        other = torch.randn(flat.shape[1], generator=source, dtype=torch.float64)
        other -= torch.linalg.pinv(flat) @ (flat @ other)  # no effect on any fact
        moved = {
            layer: updates[layer] + 0.01 * part.reshape(updates[layer].shape)
            for layer, part in enumerate(other.chunk(2))
        }
        torch.testing.assert_close(effect(moved), wanted, rtol=1e-6, atol=1e-6)
        assert sum(metrics[layer].cost(moved[layer]) for layer in (0, 1)) > cost


def test_only_the_listed_neurons_of_the_mask_move() -> None:
    model, three = tiny_model(), facts()
    mask = neuron_mask(model, ["1:3", "1:9", "2:40"], "values")
    delta = NeuronDescent(slack=0.1, where="prompt", prob_stop=1e-6).run(
        model, three[:1], [], mask, text=TEXT
    )
    assert delta.outside(mask) == 0
    assert delta.n_changed == 3 * 32
    some = NeuronDescent(slack=0.1, where="prompt", prob_stop=1e-6, neurons=("1:9",)).run(
        model, three[:1], [], mask, text=TEXT
    )
    (change,) = some.changes.values()
    assert change.selection.touched(1).nonzero().flatten().tolist() == [9]
    layer = NeuronDescent(layers=(-2,), prob_stop=1e-6, where="prompt")
    assert layer.own_mask(model) == down(model, 1)
    assert set(layer.run(model, three[:1], [], down(model), text=TEXT).changes) == set(down(model, 1).entries)
    moment = within(second_moments(model, [1], TEXT)[1].mean, torch.tensor([9]))
    assert SecondMomentMetric.of(moment, 0.0).condition == pytest.approx(1.0)


def test_rounds_bring_each_target_to_enough_and_stop_there() -> None:
    model, three = double("llama"), [replace(fact, held_out=False) for fact in facts()]
    before = measure(model, three).prob
    enough = float(before[:2].min()) / 4
    editor = NeuronDescent(where="all", prob_stop=enough, nats=0.5, rounds=60, slack=0.0, prefixes=0)
    delta = editor.run(model, three[:2], three[2:], down(model), text=TEXT)
    with delta.applied(model):
        after = measure(model, three).prob
    assert delta.provenance["facts_by_round"][0] == 2
    assert (after[:2] / enough).tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    assert float(after[2]) == pytest.approx(float(before[2]), rel=0.3)
    unmoved = NeuronDescent(prob_stop=0.999).run(model, three[:2], [], down(model), text=TEXT)
    assert unmoved.n_changed == 0


def test_what_is_wrong_is_said() -> None:
    model, three = tiny_model(), facts()
    with pytest.raises(InputError, match="nothing to forget"):
        NeuronDescent().run(model, [], [], down(model), text=TEXT)
    with pytest.raises(InputError, match="must not be negative"):
        NeuronDescent(slack=-1.0)
    with pytest.raises(InputError, match="between 0 and 1"):
        NeuronDescent(prob_stop=1.0)
    same = [three[0], replace(three[0], id="again")]
    with pytest.raises(InputError, match="cannot tell the facts apart"):
        NeuronDescent(slack=0.0, prob_stop=1e-9).run(model, same, [], down(model, 1), text=TEXT)
