"""The latent adversary raises the targets within its ball, and goes away again."""

from __future__ import annotations

import pytest
import torch

from editors import OBJECTIVES, RMU, Retain, Training
from editors.training.latent_adversary import LatentAttack, Perturbation, project
from editors.training.parametrize import Deltas
from editors.training.prediction import Prediction
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.forward import batches, label_logits, label_nll
from locus.mask import WeightMask, shapes_of
from locus.tokens import encode
from tests.editors.training.test_finetune import known_facts
from tests.tiny import tiny_facts, tiny_model


def test_projection_by_hand() -> None:
    """(3, 4) has norm 5: shortened to (1.2, 1.6); (0.6, 0.8) lies inside the ball of radius 2."""
    long, short = project(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), 2.0)
    torch.testing.assert_close(long, torch.tensor([1.2, 1.6]))
    torch.testing.assert_close(short, torch.tensor([0.6, 0.8]))


def test_makes_the_targets_likelier_the_further_it_may_go() -> None:
    model = tiny_model("smollm")
    (batch,) = batches([encode(model, fact) for fact in tiny_facts()])

    def nll() -> float:
        with torch.no_grad():
            return float(label_nll(label_logits(model, batch), batch).sum())

    found = [nll()]
    for epsilon in (0.2, 2.0):
        with (
            LatentAttack(steps=12, epsilon=epsilon, lr=epsilon / 4).worst_perturbation(model, batch).on(model)
        ):
            found.append(nll())
    assert found[0] > found[1] > found[2]
    assert nll() == found[0]


def test_a_layer_the_model_has_not_is_refused() -> None:
    model = tiny_model("smollm")
    (batch,) = batches([encode(model, fact) for fact in tiny_facts()])
    with pytest.raises(InputError, match="attack layer 9: the model has layers 0 to 2"):
        LatentAttack(steps=1, layer=9).worst_perturbation(model, batch)


def test_a_layer_that_the_objective_never_runs_is_refused() -> None:
    """RMU on three layers ends its forward at layer 0; the attack is on layer 1."""
    model = tiny_model("smollm")
    mask = WeightMask.of_parameters(["model.layers.0.mlp.down_proj.weight"], shapes_of(model.module))
    editor = RMU(retain=Retain(term="none"), training=Training(attack=LatentAttack(steps=1)))
    with pytest.raises(InputError, match=r"perturbs model\.layers\.1, above the layers .* --attack-layer"):
        editor.run(model, tiny_facts(), [], mask)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_attacked(name: str) -> None:
    model = tiny_model("smollm")
    forget, _ = known_facts(model)
    mask = WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))

    def edited(steps: int) -> WeightDelta:
        attack = LatentAttack(steps=steps, epsilon=1.0, lr=0.5, layer=0)
        training = Training(
            steps=1, goal=0.0, utility=0.0, floor=0.0, attack=attack, optimizer="sgd", clip=0.0
        )
        delta: WeightDelta = OBJECTIVES[name](retain=Retain(term="none"), training=training).run(
            model, forget, [], mask
        )
        return delta

    plain, attacked = edited(0), edited(2)
    assert any((plain.changes[n].new != attacked.changes[n].new).any() for n in plain.changes)


def test_the_reference_never_sees_the_adversary() -> None:
    model = tiny_model("smollm")
    (batch,) = batches([encode(model, fact) for fact in tiny_facts()])
    plain = Prediction(model, Deltas(model.module, WeightMask({})), batch)
    found = LatentAttack(steps=2, epsilon=1.0, lr=0.5).worst_perturbation(model, batch)
    attacked = plain.under(found)
    assert (attacked.logits - plain.logits).abs().max() > 0.01
    assert torch.equal(attacked.ref_logits, plain.ref_logits)
    assert torch.equal(attacked.ref_hidden([1]), plain.ref_hidden([1]))
    assert not torch.equal(attacked.hidden([1]), plain.hidden([1]))


def test_another_answer_is_perturbed_at_its_prompt_alone() -> None:
    """Prompts of 2 and 1 positions, answers in rows of 4: only there the perturbation remains."""
    delta = torch.arange(1.0, 13.0).reshape(2, 3, 2)
    moved = Perturbation("block", delta, torch.tensor([2, 1])).on_prompts(4).delta
    assert moved.shape == (2, 4, 2)
    assert torch.equal(moved[0, :2], delta[0, :2]) and torch.equal(moved[1, :1], delta[1, :1])
    assert not moved[0, 2:].any() and not moved[1, 1:].any()


def test_the_prompt_ends_where_the_target_begins() -> None:
    model = tiny_model("smollm")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    (batch,) = batches(encoded)
    found = LatentAttack(steps=1).worst_perturbation(model, batch)
    assert found.prompt_lengths.tolist() == [encoded[i].target_start for i in batch.examples]
