"""Retain terms: hidden-state distance by hand, and what each term holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editors.editor import EditData
from editors.training.data import Data
from editors.training.parametrize import Deltas
from editors.training.prediction import Prediction
from editors.training.retain import Retain, hidden_mse
from editors.training.settings import Training
from locus.errors import InputError
from locus.forward import batches, label_logits
from locus.mask import WeightMask, shapes_of
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model


def test_hidden_mse_by_hand() -> None:
    """Differences 1 and 3 in one of two dimensions: (1 + 0 + 9 + 0) / 4."""
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    b = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])
    assert float(hidden_mse(a, b)) == 2.5


def test_hidden_mse_of_half_precision_is_taken_in_float32() -> None:
    """1 and 1 + 1/128 are neighbours in bfloat16; a mean of 1/128 ** 2 and of 0 is no bfloat16 number's square sum."""
    a = torch.ones(1, 1, 3, dtype=torch.bfloat16)
    b = a + torch.tensor([1 / 128, 3 / 128, 5 / 128], dtype=torch.bfloat16)
    assert float(hidden_mse(a, b)) == pytest.approx((1 + 9 + 25) / 3 / 128**2, rel=1e-6)


def test_each_retain_loss_by_hand() -> None:
    """NLL: a mean over target tokens of both examples together, not over examples; hidden: the named layers."""
    model = tiny_model("smollm")
    (batch,) = batches([encode(model, fact) for fact in tiny_facts()])
    deltas = Deltas(
        model.module, WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))
    )
    with deltas.attached():
        deltas.load({name: value + 0.05 for name, value in deltas.values.items()})
        kept = Prediction(model, deltas, batch)
        log_prob = label_logits(model, batch).log_softmax(-1)
        with deltas.silenced():
            ref = label_logits(model, batch).log_softmax(-1)
        rows = torch.arange(len(batch.labels))
        expected = {
            "nll": -log_prob[rows, batch.labels].mean(),
            "kl": (ref.exp() * (ref - log_prob)).sum(-1).mean(),
            "hidden": ((kept.hidden([0, 2]) - kept.ref_hidden([0, 2])) ** 2).mean(),
        }
        for term, value in expected.items():
            loss = Retain(term=term, layers=(0, -1)).loss(kept)  # type: ignore[arg-type]
            assert float(value.detach()) > 0
            torch.testing.assert_close(loss, value, rtol=1e-5, atol=1e-7)


def related(n_near: int, n_far: int) -> Data:
    """One fact to forget, retain facts of its relation and others."""
    model = tiny_model("smollm")
    one = dataclasses.replace(tiny_facts()[0], relation="capital", held_out=False)
    kept = [dataclasses.replace(one, id=f"near-{i}") for i in range(n_near)]
    kept += [dataclasses.replace(one, id=f"far-{i}", relation="other") for i in range(n_far)]
    return Data.read(model, EditData([one], kept), Retain(term="none"), Training(utility=0.0))


@pytest.mark.parametrize(
    ("n_near", "n_far", "expected"),
    [(10, 10, (6, 2)), (3, 10, (3, 5)), (10, 1, (7, 1)), (0, 10, (0, 8)), (2, 3, (2, 3))],
)
def test_retain_facts_come_from_the_forgotten_relations_first(
    n_near: int, n_far: int, expected: tuple[int, int]
) -> None:
    data, term = related(n_near, n_far), Retain(facts=8, near=0.75)
    for step in range(3):
        drawn = [i for batch in data.retain_batches(term, Training(), step) for i in batch.examples]
        assert len(drawn) == len(set(drawn)) <= sum(expected)
        if step == 0:
            assert (sum(i < n_near for i in drawn), sum(i >= n_near for i in drawn)) == expected


def test_a_share_outside_0_and_1_is_refused() -> None:
    with pytest.raises(InputError, match="share"):
        Retain(near=1.5)


def test_negative_amounts_are_refused() -> None:
    with pytest.raises(InputError, match="must not be negative"):
        Retain(weight=-1.0)
