"""Batched target scores against the obvious way: one sequence at a time, all logits."""

from __future__ import annotations

import pytest
import torch

from locus.fact import Example
from locus.forward import MOST_PADDING, batches, label_logits, label_nll, measure
from locus.tokens import Encoded, encode
from tests.tiny import ARCHITECTURES, tiny_model

EXAMPLES = [
    Example("The capital of France is", " Paris"),
    Example("The", " dog barks at the cat"),
    Example("A cat", " sleeps"),
]


def _slow(model, example):
    encoded = encode(model, example)
    logits = model.module(torch.tensor([encoded.ids])).logits[0].float()
    log_probs = logits.log_softmax(-1)
    positions = range(encoded.target_start, len(encoded.ids))
    picked = torch.stack([log_probs[p - 1, encoded.ids[p]] for p in positions])
    correct = all(int(log_probs[p - 1].argmax()) == encoded.ids[p] for p in positions)
    return float(-picked.sum()), len(picked), correct, float(picked[0].exp())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_measure_equals_one_full_forward_an_example(arch):
    model = tiny_model(arch)
    scores = measure(model, EXAMPLES)
    for i, example in enumerate(EXAMPLES):
        nll, n, correct, first = _slow(model, example)
        assert float(scores.nll[i]) == pytest.approx(nll, rel=1e-4, abs=1e-4)
        assert int(scores.n_tokens[i]) == n
        assert bool(scores.correct[i]) == correct
        assert float(scores.first_prob[i]) == pytest.approx(first, rel=1e-3)


def test_a_target_the_model_would_choose_is_correct():
    model = tiny_model("llama")
    encoded = encode(model, Example("The capital of France is", " x"))
    choice = model.module(torch.tensor([encoded.prompt_ids])).logits[0, -1].argmax()
    target = model.tokenizer.decode([int(choice)])
    if len(model.tokenizer(target, add_special_tokens=False).input_ids) != 1:
        pytest.skip("the tiny model's first choice does not survive decoding")
    assert bool(measure(model, [Example("The capital of France is", target)]).correct[0])


def test_batch_size_does_not_matter_and_order_is_the_callers():
    model = tiny_model("gpt2")
    alone = measure(model, EXAMPLES, max_tokens=1)
    together = measure(model, EXAMPLES, max_tokens=4096)
    assert torch.allclose(alone.nll, together.nll, atol=1e-4)
    backwards = measure(model, EXAMPLES[::-1])
    assert torch.allclose(backwards.nll.flip(0), together.nll, atol=1e-4)


def test_batches_hold_every_example_once_within_the_budget():
    model = tiny_model("llama")
    encoded = [encode(model, e) for e in EXAMPLES * 5]
    made = batches(encoded, max_tokens=40)
    assert sorted(i for batch in made for i in batch.examples) == list(range(len(encoded)))
    assert all(batch.ids.numel() <= 40 or len(batch.examples) == 1 for batch in made)


def test_a_batch_is_cut_before_its_padding_costs_more_than_another():
    """Thirty of 10 tokens and thirty of 100; and 40 lengths a token apart, whose one batch would be a third padding."""
    two = [Encoded(tuple(range(n)), 1, None, ()) for n in [10, 100] * 30]
    assert [batch.ids.shape for batch in batches(two)] == [(30, 10), (30, 100)]
    growing = batches([Encoded(tuple(range(n)), 1, None, ()) for n in range(40, 80)])
    padding = [int((batch.attention_mask == 0).sum()) for batch in growing]
    assert max(padding) <= MOST_PADDING and len(growing) == 4  # of 11, 11, 11 and 7: 0 + 1 + ... + 10 = 55


def test_gradients_flow_and_only_labels_are_unembedded():
    model = tiny_model("gemma2")
    encoded = [encode(model, e) for e in EXAMPLES]
    (batch,) = batches(encoded)
    weight = model.module.get_submodule(model.atlas.mlp[0])
    parameter = next(weight.parameters()).requires_grad_(True)
    try:
        logits = label_logits(model, batch)
        assert logits.shape[0] == sum(e.n_target for e in encoded)
        label_nll(logits, batch).sum().backward()
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0
    finally:
        parameter.grad = None
        parameter.requires_grad_(False)
