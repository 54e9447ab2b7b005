"""RMU steers one block and holds the same one; a block that the model lacks is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from editors import RMU, HeadProjection, Retain, Training
from editors.training.prediction import block_numbers, steering_layer
from locus.errors import InputError
from locus.mask import WeightMask, shapes_of
from tests.tiny import tiny_facts, tiny_model

SHORT = Training(steps=3, lr=0.05, floor=0.0, goal=0.0, utility=0.0, max_kl=0.0)


def retain_losses(editor: RMU) -> list[float]:
    """Of each step of an edit of the blocks 3 to 5 of 8, all above the block that RMU steers by default."""
    model = tiny_model("llama", num_hidden_layers=8)
    assert steering_layer(8) == 1
    mask = WeightMask.of_parameters(
        [f"*.{i}.mlp.down_proj.weight" for i in (3, 4, 5)], shapes_of(model.module)
    )
    facts = [dataclasses.replace(fact, held_out=False) for fact in tiny_facts()]
    history: list[Mapping[str, Any]] = []
    editor.run(model, facts[:1], facts[1:], mask, log=history.append)
    return [record["retain_loss"] for record in history]


def test_the_retain_term_holds_the_block_that_is_steered() -> None:
    """As it does when the block is named for both; at the first step nothing has moved."""
    term = Retain(term="hidden", weight=100.0, texts=0)
    losses = retain_losses(RMU(layer=5, retain=term, training=SHORT))
    assert losses[0] == 0.0 and all(loss > 0 for loss in losses[1:])
    named = dataclasses.replace(term, layers=(5,))
    assert losses == retain_losses(RMU(layer=5, retain=named, training=SHORT))


def test_other_objectives_hold_the_block_of_the_paper() -> None:
    """At 7/32 of the depth, which lies below the mask here: it cannot move."""
    from editors import NPO

    losses = retain_losses(NPO(retain=Retain(term="hidden", texts=0), training=SHORT))  # type: ignore[arg-type]
    assert losses == [0.0] * 3


def test_blocks_that_the_model_lacks_are_refused() -> None:
    assert block_numbers([0, 2, -1, -3], 3, "layer") == [0, 2, 2, 0]
    for editor, message in (
        (RMU(layer=8), "layer 8: the model has layers 0 to 7"),
        (
            RMU(retain=Retain(term="hidden", layers=(-9,), texts=0)),
            "retain layer -9: the model has layers 0 to 7",
        ),
        (HeadProjection(layers=(9,)), "layer 9: the model has layers 0 to 7"),
    ):
        with pytest.raises(InputError, match=message):
            retain_losses(editor)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="layer = -2"):
        RMU(layer=-2)
