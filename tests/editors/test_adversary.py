"""The latent adversary raises the targets within its ball, and goes away again."""

from __future__ import annotations

import pytest
import torch

from editors.adversary import LatentAttack, project
from locus.errors import InputError
from locus.forward import batches, label_logits, label_nll
from locus.tokens import encode
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
        with LatentAttack(steps=12, epsilon=epsilon, lr=epsilon / 4).applied(model, batch):
            found.append(nll())
    assert found[0] > found[1] > found[2]
    assert nll() == found[0]


def test_a_layer_the_model_has_not_is_refused() -> None:
    model = tiny_model("smollm")
    (batch,) = batches([encode(model, fact) for fact in tiny_facts()])
    with (
        pytest.raises(InputError, match="attack layer 9: the model has layers 0 to 2"),
        LatentAttack(steps=1, layer=9).applied(model, batch),
    ):
        pass
