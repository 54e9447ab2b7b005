"""Text that a model writes itself."""

from __future__ import annotations

import torch

from locus.text import generated_text
from tests.tiny import tiny_model


def test_the_same_seed_writes_the_same_paragraphs_and_leaves_the_global_generator_alone() -> None:
    model = tiny_model("smollm")
    state = torch.random.get_rng_state()
    a, b, c = (generated_text(model, n=6, n_tokens=12, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert a == b != c
    assert 1 <= len(a) <= 6 and len(set(a)) == len(a)
    assert not any("\n" in text or "<" + "pad>" in text for text in a)


def test_it_is_sampled_and_not_the_likeliest_continuation() -> None:
    """Twelve paragraphs from one opening are not one."""
    model = tiny_model("smollm")
    texts = generated_text(model, n=24, n_tokens=8)
    assert len({text for text in texts if text.startswith("The")}) > 1
