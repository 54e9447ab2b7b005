"""Jang et al.'s two measures."""

from __future__ import annotations

import dataclasses

import torch

from editors.training.memorization import extraction_likelihood, memorization_accuracy, ngram_overlap
from locus.tokens import Encoded, encode
from tests.tiny import tiny_facts, tiny_model


def test_overlap_by_hand() -> None:
    """2-grams of 1 2 3 9: 12, 23, 39; of them 12 and 23 occur in 0 1 2 3."""
    assert ngram_overlap([1, 2, 3, 9], [0, 1, 2, 3], 2) == 2 / 3
    assert ngram_overlap([1], [1], 2) == 0.0


def test_what_the_model_writes_itself_is_wholly_memorized() -> None:
    model = tiny_model("llama")
    start = encode(model, dataclasses.replace(tiny_facts()[0])).prompt_ids
    ids = torch.tensor([start])
    written = model.module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0].tolist()
    own = Encoded(tuple(written), len(start), None, ("",) * len(written))
    assert memorization_accuracy(model, [own]) == 1.0
    assert extraction_likelihood(model, [own], n=2) == 1.0
    other = Encoded((*written[:-6], *[(t + 1) % 300 + 3 for t in written[-6:]]), len(start), None, own.tokens)
    assert memorization_accuracy(model, [own, other]) < 1.0
    assert extraction_likelihood(model, [other], n=2) < 0.5
