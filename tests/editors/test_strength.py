"""Neuron edits on tiny models: what each one does to a layer's output, and how the strength is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editors.key_value.key_positions import row, states
from editors.key_value.neuron_parts import located_parts, neuron_mask
from editors.key_value.second_moments import mean_keys, second_moments
from editors.neurons.neuron_edits import NeuronDirection, NeuronFlip, NeuronMean, NeuronZero
from editors.neurons.neuron_selective import NeuronSelective
from editors.strength import AROUND, STEPS, Direction, StrengthJudge, curve, smallest
from locus.errors import InputError
from locus.hooks import patched
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from tests.editors.direct_edits import ARCHITECTURES, TEXT, down, facts, untouched
from tests.tiny import tiny_model

NEURONS = ("0:3", "1:0", "1:47")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.module(torch.tensor([[1, 5, 9, 30, 7]])).logits
    return out


def put(model: Model, layer: int, values: dict[int, float | Tensor]) -> tuple[str, object]:
    """A patch of a layer's activations: these neurons get these values."""

    def patch(keys: Tensor) -> Tensor:
        keys = keys.clone()
        for neuron, value in values.items():
            keys[..., neuron] = value * keys[..., neuron] if isinstance(value, float) else value
        return keys

    return model.atlas.neuron_in[layer], patch


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("strength", [1.0, 2.0, -1.0, 0.3])
def test_scaled_values_are_scaled_activations(arch: str, strength: float) -> None:
    model = tiny_model(arch)
    left = 1.0 - strength
    patches = dict([put(model, 0, {3: left}), put(model, 1, {0: left, 47: left})])
    with patched(model.module, inputs=patches):  # type: ignore[arg-type]
        wanted = logits(model)
    with untouched(model):
        delta = NeuronZero(strength=strength).run(model, [], [], neuron_mask(model, NEURONS))
    with delta.applied(model):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-3)


def test_keys_without_an_answer_are_no_activation() -> None:
    """A neuron whose key rows and biases are zero never fires: the same as one that writes nothing."""
    for arch in ("llama", "gemma2"):
        model = tiny_model(arch)
        mask = neuron_mask(model, NEURONS)
        with NeuronZero(part="keys").run(model, [], [], mask).applied(model):
            by_keys = logits(model)
        with NeuronZero(part="values").run(model, [], [], mask).applied(model):
            torch.testing.assert_close(by_keys, logits(model), rtol=1e-4, atol=1e-4)


def test_flip_is_twice_the_zero() -> None:
    model, mask = tiny_model(), neuron_mask(tiny_model(), NEURONS)
    flipped = NeuronFlip().run(model, [], [], mask)
    for change in flipped.changes.values():
        assert torch.equal(change.new, -change.old)
    assert flipped.id == NeuronZero(strength=2.0).run(model, [], [], mask).id


@pytest.mark.parametrize("arch", ["gpt2", "neox", "opt", "phi"])
def test_mean_ablation_is_activations_at_their_mean(arch: str) -> None:
    model = tiny_model(arch)
    mask = neuron_mask(model, NEURONS, "values")
    biases = [name.removesuffix("weight") + "bias" for name in mask.entries]
    mask = mask | WeightMask.of_parameters(biases, shapes_of(model.module), model.fingerprint)
    means = mean_keys(model, [0, 1], TEXT)
    patches = dict(
        [
            put(model, 0, {3: means[0][3].float()}),
            put(model, 1, {0: means[1][0].float(), 47: means[1][47].float()}),
        ]
    )
    with patched(model.module, inputs=patches):  # type: ignore[arg-type]
        wanted = logits(model)
    with NeuronMean().run(model, [], [], mask, text=TEXT).applied(model):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_without_a_bias_the_mean_is_written_by_the_neurons(arch: str) -> None:
    """W becomes (W E[k]) aᵀ, a = C⁻¹ E[k]: on average over text, the layer's output hardly changes."""
    model = tiny_model(arch)
    mask = neuron_mask(model, [f"1:{i}" for i in range(24)], "values")
    mean = mean_keys(model, [1], TEXT)[1][:24]
    moment = second_moments(model, [1], TEXT)[1].mean[:24, :24]
    moment += 0.01 * moment.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    share = torch.linalg.solve(moment, mean)
    delta = NeuronMean(ridge=0.01).run(model, [], [], mask, text=TEXT)
    (change,) = delta.changes.values()
    old, new = change.old.double(), change.new.double()
    torch.testing.assert_close(new, (old @ mean)[:, None] * share, rtol=1e-4, atol=1e-5)
    assert delta.provenance["constant"][1] == pytest.approx(float(mean @ share))
    assert 0.1 < delta.provenance["constant"][1] <= 1
    zeroed = NeuronZero().run(model, [], [], mask)
    by_zero, by_mean = (old - x for x in (next(iter(zeroed.changes.values())).new.double(), new))
    assert float((by_mean @ mean).norm()) < 0.9 * float((by_zero @ mean).norm())


def test_mean_ablation_says_what_it_lacks() -> None:
    gpt2 = tiny_model("gpt2")
    with pytest.raises(InputError, match="does not hold all of it"):
        NeuronMean().run(gpt2, [], [], neuron_mask(gpt2, NEURONS), text=TEXT)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_turned_values_speak_of_something_else(arch: str) -> None:
    """Each value loses the target's unit direction and gains the other word's, in units of its own norm."""
    model, fact = tiny_model(arch), facts()[0]
    mask = neuron_mask(model, NEURONS, "values")
    editor = NeuronDirection(word=" Berlin", old=1.5, new=0.5)
    delta = editor.run(model, [fact], [], mask)
    head = model.module.get_parameter(model.atlas.unembed + ".weight").detach().double()
    from locus.tokens import encode

    old = head[encode(model, fact).target_ids[0]]
    new = head[encode(model, replace(fact, target=" Berlin")).target_ids[0]]
    turn = 0.5 * new / new.norm() - 1.5 * old / old.norm()
    for change in delta.changes.values():
        before, after = change.old.double(), change.new.double()
        before, after = (x if x.shape[0] == 32 else x.mT for x in (before, after))
        moved = before != after
        for column in moved.any(0).nonzero().flatten():
            wanted = before[:, column] + before[:, column].norm() * turn
            torch.testing.assert_close(after[:, column], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_selective_ablation_gives_the_forget_facts_what_the_others_get(arch: str) -> None:
    """With all neurons of a layer and no weight on the rest, the layer's output at the fact is the retain mean."""
    model, (fact, other, _) = tiny_model(arch), facts()
    site = model.atlas.neuron_in[1]
    editor = NeuronSelective(where="prompt", weight=0.0, prefixes=0)
    wanted = states(model, [row(model, other, 0, "prompt")], outputs=[site])[1][site]
    with untouched(model):
        delta = editor.run(model, [fact], [other], down(model, 1), text=TEXT)
    with delta.applied(model):
        got = states(model, [row(model, fact, 0, "prompt")], outputs=[site])[1][site]
        kept = states(model, [row(model, other, 0, "prompt")], outputs=[site])[1][site]
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02)
    assert float((kept - wanted).norm()) < float(
        (got - states(model, [row(model, fact, 0, "prompt")], outputs=[site])[1][site]).norm()
    )


def test_strength_is_where_the_goal_is_crossed() -> None:
    model, three = tiny_model(), facts()
    mask = down(model)
    selections = located_parts(model, mask, "values")
    direction = Direction(
        selections, {n: -s.take(model.module.get_parameter(n)) for n, s in selections.items()}
    )
    judge = StrengthJudge.of(model, three, three, TEXT)
    start, end = (point.forget_prob for point in curve(judge, direction, [0.0, 1.0]))
    nothing = curve(judge, direction, [0.0])[0]
    assert nothing.kl == pytest.approx(0.0, abs=1e-5)
    goal = (start + end) / 2
    with untouched(model):
        strength, points = smallest(judge, direction, goal, 1.0) if end < start else (None, [])
    if strength is not None:
        assert len(points) == 1 + STEPS
        by_strength = {point.strength: point.forget_prob for point in points}
        assert by_strength[strength] <= goal
        below = judge.look(direction, strength - 2.0**-STEPS)
        assert below.forget_prob > goal


def test_a_goal_that_cannot_be_reached_is_reported() -> None:
    model, three = tiny_model(), facts()
    mask = neuron_mask(model, ["0:3"], "values")
    records: list[object] = []
    delta = NeuronZero(strength_goal=1e-30).run(model, three, [], mask, text=TEXT, log=records.append)
    assert delta.provenance["reached"] is False
    assert delta.provenance["strength"] == 1.0
    assert len(records) == len(AROUND)  # the curve; the strength itself is one of its points
    with pytest.raises(InputError, match="is empty"):
        NeuronZero(strength_goal=0.1).run(model, [], [], mask)


def test_neurons_are_named_exactly() -> None:
    model = tiny_model()
    mask = neuron_mask(model, NEURONS, "values")
    assert mask.neurons_per_layer(model.atlas).tolist() == [1, 2, 0]
    delta = NeuronZero(neurons=("1:47",)).run(model, [], [], mask)
    (change,) = delta.changes.values()
    assert change.selection.touched(1).nonzero().flatten().tolist() == [47]
    for wrong, said in (
        (("1:48",), "layers 0 to 2 of 48"),
        (("x",), "layer:neuron"),
        (("2:2",), "does not hold"),
    ):
        with pytest.raises(InputError, match=said):
            NeuronZero(neurons=wrong).run(model, [], [], mask)
    with pytest.raises(InputError, match="holds no keys"):
        NeuronZero(part="keys").run(model, [], [], mask)


def test_a_curve_is_looked_at_where_it_is_asked_for() -> None:
    model, three = tiny_model(), facts()
    mask = neuron_mask(model, ["0:3", "1:0"], "values")
    editor = NeuronZero(strength=2.0, strength_curve=(1.0, 0.0, 0.5))
    delta = editor.run(model, three, three, mask, text=TEXT)
    points = delta.provenance["strength_curve"]
    assert [point["strength"] for point in points] == [0.0, 0.5, 1.0]
    assert points[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert delta.provenance["strength"] == 2.0  # a curve chooses nothing
    with pytest.raises(InputError, match="a probability below 1"):
        NeuronZero(strength_goal=1.0)


def test_listed_neurons_are_a_mask_of_their_own() -> None:
    gpt2, llama = tiny_model("gpt2"), tiny_model("llama")
    for editor, roles in (
        (NeuronZero(neurons=NEURONS), {"down"}),
        (NeuronZero(part="gate", neurons=NEURONS), {"gate"}),
        (NeuronFlip(part="both", neurons=NEURONS), {"gate", "up", "down"}),
        (NeuronDirection(neurons=NEURONS), {"down"}),
        (NeuronSelective(neurons=NEURONS), {"down"}),
    ):
        mask = editor.own_mask(llama)
        held = {part.role for layer in llama.atlas.neurons for part in layer if part.param in mask.entries}
        assert held == roles
        assert mask.neurons_per_layer(llama.atlas).tolist() == [1, 2, 0]
    with (
        NeuronMean(neurons=NEURONS)
        .run(gpt2, [], [], NeuronMean(neurons=NEURONS).own_mask(gpt2), text=TEXT)
        .applied(gpt2)
    ):
        listed = logits(gpt2)
    by_hand = neuron_mask(gpt2, NEURONS, "values")
    biases = [name.removesuffix("weight") + "bias" for name in by_hand.entries]
    by_hand = by_hand | WeightMask.of_parameters(biases, shapes_of(gpt2.module), gpt2.fingerprint)
    with NeuronMean().run(gpt2, [], [], by_hand, text=TEXT).applied(gpt2):
        assert torch.equal(listed, logits(gpt2))
    with pytest.raises(InputError, match="layer:neuron"):
        NeuronZero().own_mask(llama)
