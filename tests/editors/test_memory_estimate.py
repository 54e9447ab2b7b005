"""The memory estimate: exact where it can be worked out, equal to a real step, and knowing what a mask spares."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from editors import DPO, NPO, RMU, ROME, Retain, TaskVector, Training
from editors.editor import EditData
from editors.memory_estimate import ForwardSize, LargestForwards, MemoryEstimate
from editors.training.data import Data
from editors.training.finetune import Run
from editors.training.live_bytes import LiveBytes
from editors.training.parametrize import Deltas
from editors.training.run_state import RunState
from editors.training.settings import make_optimizer
from locus.errors import InputError
from locus.mask import WeightMask
from locus.model import Model, wrap
from tests.tiny import tiny_facts, tiny_model, tiny_module, tiny_tokenizer

LOADS = LargestForwards(forget=(ForwardSize(4, 12, 8),), retain=(), text=())


def mask_of(model: Model, lowest: int = 0) -> WeightMask:
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[lowest:, ::4] = True
    return WeightMask.of_neurons(model.atlas, chosen)


def npo(**training: Any) -> NPO:
    settings = {"floor": 0.0, "goal": 0.0, "utility": 0.0, "max_kl": 0.0, **training}
    return NPO(training=Training(**settings))


def test_what_can_be_worked_out_is_exact() -> None:
    """Deltas and the copy of them are float32, and each selection has an index of 12 places of 8 bytes."""
    model = tiny_model("smollm")
    mask = mask_of(model)
    estimate = MemoryEstimate.of(model, mask, npo(), dataclasses.replace(LOADS, kept_labels=7))
    assert estimate.weights == sum(p.numel() for p in model.module.parameters()) * 4 + sum(
        b.nbytes for b in model.module.buffers()
    )
    assert estimate.deltas == 2 * 4 * mask.n_weights + 8 * 12 * len(mask.entries)
    assert estimate.gradients == 4 * mask.n_weights
    assert estimate.optimizer == 2 * 4 * mask.n_weights + 4 * len(mask.entries)  # and each step's count
    assert estimate.references == 7 * model.atlas.d_model * 4
    assert estimate.to_json()["peak"] == estimate.peak
    assert MemoryEstimate.of(model, mask, npo(optimizer="sgd"), LOADS).optimizer == 0


def test_equals_a_real_step() -> None:
    """Two real steps under the same count: the estimate is within five percent of their peak."""
    model = tiny_model("gemma2", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    facts = [dataclasses.replace(fact, held_out=False) for fact in tiny_facts()]
    editor, mask = npo(steps=2), mask_of(model)
    text = ["Berlin is the capital and the largest city of Germany. What language does he speak? French."]
    estimate = MemoryEstimate.of(
        model, mask, editor, LargestForwards.of(model, editor, EditData(facts, [facts[0]], text))
    )
    data = Data.read(model, EditData(facts, [facts[0]], text), editor.retain, editor.training)
    with LiveBytes() as counted:
        counted.count([*model.module.parameters(), *model.module.buffers()])
        deltas = Deltas(model.module, mask)
        run = Run(editor, model, deltas, data, make_optimizer(editor.training, deltas.parameters))
        state = RunState.fresh(len(data.forget), deltas.values)
        with deltas.attached():
            run.take_step(state)
            run.take_step(state)
    assert estimate.peak == pytest.approx(counted.peak, rel=0.05)


def test_a_high_mask_and_checkpointing_spare_activations_and_no_weights() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    whole = MemoryEstimate.of(model, mask_of(model), npo(), LOADS)
    high = MemoryEstimate.of(model, mask_of(model, lowest=3), npo(), LOADS)
    again = MemoryEstimate.of(model, mask_of(model), npo(checkpointing=True), LOADS)
    assert high.activations < 0.5 * whole.activations
    assert again.activations < 0.3 * whole.activations
    assert whole.weights == high.weights == again.weights


def test_a_model_without_weights_has_the_same_account() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.device("meta"):
        module = type(model.module)._from_config(model.module.config)
    empty = wrap(module, tiny_tokenizer())
    assert MemoryEstimate.of(empty, mask_of(empty), npo(), LOADS) == MemoryEstimate.of(
        model, mask_of(model), npo(), LOADS
    )


def test_half_precision_halves_the_weights_and_not_the_deltas() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    full = MemoryEstimate.of(model, mask_of(model), npo(), LOADS)
    model.module.to(torch.bfloat16)
    half = MemoryEstimate.of(model, mask_of(model), npo(rounding="compensated"), LOADS)
    assert half.weights == pytest.approx(full.weights / 2, rel=0.01)
    assert (half.deltas, half.gradients, half.optimizer) == (full.deltas, full.gradients, full.optimizer)


@pytest.mark.parametrize("editor", [DPO(), RMU(), TaskVector()])
def test_other_objectives_have_one_too(editor: Any) -> None:
    model = tiny_model("smollm", num_hidden_layers=2)
    estimate = MemoryEstimate.of(
        model, mask_of(model), editor, dataclasses.replace(LOADS, text=(ForwardSize(1, 40, 39),))
    )
    assert estimate.activations > 0 and estimate.transient > 0


def test_what_trains_nothing_or_fits_another_model_is_refused() -> None:
    model = tiny_model("smollm")
    with pytest.raises(InputError, match="ROME trains nothing"):
        MemoryEstimate.of(model, mask_of(model), ROME())
    with pytest.raises(InputError, match="no memory estimate for LoRA"):
        MemoryEstimate.of(model, mask_of(model), npo(lora_rank=2))
    with pytest.raises(InputError, match="made for another model"):
        MemoryEstimate.of(model, mask_of(wrap(tiny_module("gpt2"), tiny_tokenizer())), npo())


def test_loads_are_those_of_the_longest_examples() -> None:
    """Of three facts two are drawn a step; a paragraph is one block; held-out facts are never trained on."""
    model = tiny_model("smollm")
    facts = tiny_facts()
    editor = NPO(training=Training(forget_per_step=2))
    loads = LargestForwards.of(model, editor, EditData(facts, facts, ["Berlin is the capital of Germany"]))
    assert [load.rows for load in loads.forget] == [2]
    assert sum(load.rows for load in loads.retain) == 2
    assert loads.text[0].rows == 1 and loads.text[0].labels == loads.text[0].width - 1
    assert loads.kept_labels > 0
    alone = LargestForwards.of(model, NPO(retain=Retain(term="none")), EditData(facts, facts, ["Berlin"]))
    assert alone.retain == alone.text == () and alone.kept_labels == 0
