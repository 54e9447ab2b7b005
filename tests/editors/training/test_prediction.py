"""What objectives read of a batch equals what a plain forward gives."""

from __future__ import annotations

import torch

from editors.training.parametrize import Deltas
from editors.training.prediction import Prediction, steering_layer
from locus.forward import batches, label_logits, measure
from locus.mask import WeightMask, shapes_of
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model


def test_numbers_are_those_of_a_plain_forward_and_the_references_carry_no_gradient() -> None:
    model = tiny_model("gemma2")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    (batch,) = batches(encoded)
    mask = WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))
    deltas = Deltas(model.module, mask)
    plain = measure(model, encoded)
    order = torch.tensor(batch.examples)
    with deltas.attached():
        deltas.load({name: value + 0.05 for name, value in deltas.values.items()})
        seen = Prediction(model, deltas, batch)
        torch.testing.assert_close(seen.ref_nll, plain.nll[order])
        torch.testing.assert_close(seen.nll.detach(), measure(model, encoded).nll[order])
        assert (seen.nll - seen.ref_nll).abs().min() > 1e-3
        assert seen.nll.requires_grad and not seen.ref_nll.requires_grad
        assert seen.n_tokens.tolist() == plain.n_tokens[order].tolist()
        assert seen.correct.tolist() == (seen.token_correct == 1).tolist()
        last = model.atlas.n_layers - 1
        torch.testing.assert_close(seen.lens_logits([0, last])[1], seen.logits)
        torch.testing.assert_close(seen.ref_hidden([0]).shape, seen.hidden([0]).shape)


def test_only_keeps_the_chosen_examples_whole() -> None:
    model = tiny_model("llama")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    (batch,) = batches(encoded)
    deltas = Deltas(model.module, WeightMask({}))
    seen = Prediction(model, deltas, batch)
    keep = torch.tensor([True, False, True])
    for run_first in (False, True):
        if run_first:
            assert len(seen.logits) == len(seen.labels)
        part = seen.only(keep)
        assert part.batch.examples == (batch.examples[0], batch.examples[2])
        torch.testing.assert_close(part.nll, seen.nll[keep])
        torch.testing.assert_close(label_logits(model, part.batch), part.logits)


def test_a_truncated_forward_runs_nothing_above() -> None:
    model = tiny_model("llama")
    (batch,) = batches([encode(model, fact) for fact in tiny_facts()])
    seen = Prediction(model, Deltas(model.module, WeightMask({})), batch)
    ran: list[int] = []
    hooks = [
        model.module.get_submodule(block).register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(model.atlas.blocks)
    ]
    seen.hidden([1])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]


def test_the_steered_layer_is_rmus() -> None:
    assert [steering_layer(n) for n in (3, 30, 32, 80)] == [0, 6, 7, 17]
