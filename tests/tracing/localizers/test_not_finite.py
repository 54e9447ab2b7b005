"""NaN gradients stop a localizer by name, and do not become a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from locus.errors import InputError
from locus.model import Model
from locus.recall import known
from tests.tiny import tiny_facts, tiny_model
from tracing import LOCALIZERS


@pytest.fixture
def overflowing() -> Model:
    """Its logits overflow: log p(target) and every gradient are NaN."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.lm_head.weight.mul_(torch.inf)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "contrastive-vectors",
        "disagreeing-tensors",
        "weight-saliency",
        "slimming",
        "hard-concrete",
        "saliency",
    ],
)
def test_localizers_name_the_fact(name: str, overflowing: Model) -> None:
    facts = tiny_facts()
    with pytest.raises(InputError, match=f"'({facts[0].id}|{facts[1].id})'.*NaN or infinity"):
        LOCALIZERS[name]().run(overflowing, facts[:2], facts[2:])


def test_known_names_the_fact(overflowing: Model) -> None:
    with pytest.raises(InputError, match=f"{tiny_facts()[0].id}.*NaN or infinity"):
        known(overflowing, tiny_facts())


@pytest.mark.parametrize("score", ["fisher", "wagle"])
def test_products_of_gradients_have_room_in_half_precision(score: Any) -> None:
    """Squares of gradients of 1e-5 are 1e-10, which float16 does not know."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1e-4)
    model.module.half()
    facts = tiny_facts()
    found = LOCALIZERS["weight-saliency"](score=score, parameters=("*down_proj*",)).run(
        model, facts[:2], facts[2:]
    )
    zero = sum(int((t == 0).sum()) for t in found.values.values()) / sum(
        t.numel() for t in found.values.values()
    )
    assert zero < 0.05
