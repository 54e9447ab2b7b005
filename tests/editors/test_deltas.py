"""A scaled delta lies on the line from the base through the edit."""

from __future__ import annotations

import pytest
import torch

from editors.deltas import scaled
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.model import Model
from locus.selection import Selection
from tests.tiny import tiny_model

NAME = "model.layers.0.mlp.up_proj.weight"


def edit(model: Model) -> WeightDelta:
    selection = Selection("rows", torch.tensor([1, 3]), tuple(model.module.get_parameter(NAME).shape))
    old = selection.take(model.module.get_parameter(NAME).detach())
    return WeightDelta.of_entries(model, {NAME: (selection, old + 0.5)})


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 2.0])
def test_the_change_is_that_many_times_as_large(strength: float) -> None:
    model = tiny_model("smollm")
    before = model.module.get_parameter(NAME).detach().clone()
    with scaled(model, edit(model), strength).applied(model):
        moved = model.module.get_parameter(NAME).detach() - before
    expected = torch.zeros_like(before)
    expected[[1, 3]] = 0.5 * strength
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    assert torch.equal(model.module.get_parameter(NAME), before)


def test_one_is_the_edit_itself_to_the_bit() -> None:
    model = tiny_model("smollm")
    delta = edit(model)
    assert scaled(model, delta, 1.0).after == delta.after


def test_a_negative_strength_is_refused() -> None:
    model = tiny_model("smollm")
    with pytest.raises(InputError, match="negative"):
        scaled(model, edit(model), -1.0)
