"""LoRA through peft: confined, silent on request, exact when written into the weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editors.objectives.npo import NPO
from editors.training.lora import LoraDeltas
from editors.training.settings import Training
from editors.training.unchanged import every_digest
from locus.errors import InputError
from locus.forward import collate, label_logits, measure
from locus.mask import WeightMask, shapes_of
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model

pytest.importorskip("peft")
PATTERNS = {
    "smollm": ["model.layers.1.mlp.*", "model.layers.0.self_attn.q_proj.weight"],
    "gpt2": ["*.1.mlp.c_*.weight"],
}


@pytest.mark.parametrize("arch", PATTERNS)
def test_trains_low_rank_changes_of_located_matrices_alone(arch: str) -> None:
    model = tiny_model(arch)
    mask = WeightMask.of_parameters(PATTERNS[arch], shapes_of(model.module))
    *forget, kept = (dataclasses.replace(fact, held_out=False) for fact in tiny_facts())
    before, modules = every_digest(model.module), dict(model.module.named_modules())
    training = Training(steps=4, lr=0.05, lora_rank=2, utility=0.0, goal=0.0, floor=0.0)
    delta = NPO(training=training).run(model, forget, [kept], mask)
    assert every_digest(model.module) == before
    assert dict(model.module.named_modules()) == modules
    assert set(delta.changes) == set(mask.entries)
    for change in delta.changes.values():
        update = (change.selection.dense().float()).double()
        update[change.selection.dense()] = (change.new.double() - change.old.double()).flatten()
        assert torch.linalg.matrix_rank(update, tol=1e-4 * float(update.norm())) <= 2


def test_attached_adapters_compute_what_the_changed_weights_compute() -> None:
    model = tiny_model("smollm")
    mask = WeightMask.of_parameters(PATTERNS["smollm"], shapes_of(model.module))
    deltas = LoraDeltas(model.module, mask, rank=3, seed=0)
    source = torch.Generator().manual_seed(0)
    deltas.load({n: 0.3 * torch.randn(v.shape, generator=source) for n, v in deltas.values.items()})
    plain = measure(model, tiny_facts()).nll
    with deltas.attached():
        attached = measure(model, tiny_facts()).nll
        with deltas.silenced():
            assert torch.equal(measure(model, tiny_facts()).nll, plain)
    assert torch.equal(measure(model, tiny_facts()).nll, plain)
    state = {n: p + deltas.dense(n) if n in mask.entries else p for n, p in model.module.named_parameters()}
    twin = tiny_model("smollm")
    twin.module.load_state_dict({**twin.module.state_dict(), **state})
    torch.testing.assert_close(measure(twin, tiny_facts()).nll, attached, rtol=1e-4, atol=1e-4)
    assert (attached - plain).abs().max() > 0.01


def test_the_same_seed_draws_the_same_adapters_and_leaves_the_global_generator_alone() -> None:
    module = tiny_model("smollm").module
    mask = WeightMask.of_parameters(PATTERNS["smollm"], shapes_of(module))
    state = torch.random.get_rng_state()
    a, b, c = (LoraDeltas(module, mask, rank=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a.values[n], b.values[n]) for n in a.values)
    assert not all(torch.equal(a.values[n], c.values[n]) for n in a.values)


def test_a_mask_of_neurons_is_refused() -> None:
    model = tiny_model("smollm")
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[1, 3] = True
    with pytest.raises(InputError, match="LoRA changes whole matrices, the mask holds"):
        LoraDeltas(model.module, WeightMask.of_neurons(model.atlas, chosen), rank=2, seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_base_are_float32(dtype: torch.dtype) -> None:
    """A step of 1e-5, which bfloat16 and float16 round away at the size of the adapters' first values, moves them."""
    model = tiny_model("smollm")
    model = dataclasses.replace(model, module=model.module.to(dtype))
    mask = WeightMask.of_parameters(PATTERNS["smollm"], shapes_of(model.module))
    deltas = LoraDeltas(model.module, mask, rank=2, seed=0)
    assert {value.dtype for value in deltas.values.values()} == {torch.float32}
    with torch.no_grad():
        for name, value in deltas.values.items():
            if "lora_B" in name:
                value.fill_(0.1)
    before = {name: value.detach().clone() for name, value in deltas.values.items()}
    optimizer = torch.optim.SGD(deltas.parameters, lr=1e-5)
    batch = collate([encode(model, fact) for fact in tiny_facts()], [0, 1])
    with deltas.attached():
        logits = label_logits(model, batch)
        logits.square().sum().backward()
    for value in deltas.parameters:
        assert value.grad is not None
        value.grad.sign_()
    optimizer.step()
    for name, value in deltas.values.items():
        torch.testing.assert_close(
            (value.detach() - before[name]).abs(), torch.full_like(value, 1e-5), rtol=0.1, atol=0
        )
    change = deltas.dense(next(iter(mask.entries)))
    assert change.dtype == torch.float32
