"""Scaling neurons changes what they write by exactly that factor."""

from __future__ import annotations

import pytest
import torch

from editors.neurons import ScaleNeurons
from locus.errors import InputError
from locus.hooks import patched, record
from locus.mask import WeightMask
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 2, 31, 7]])


@pytest.mark.parametrize("arch", ["smollm", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_scaling_the_down_column_is_scaling_the_neuron(arch: str, factor: float) -> None:
    model = tiny_model(arch)
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[1, [3, 17, 40]] = True
    mask = WeightMask.of_neurons(model.atlas, chosen)
    delta = ScaleNeurons(factor=factor).run(model, (), (), mask)

    def scaled(h: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen[1], factor * h, h)

    with torch.no_grad(), patched(model.module, inputs={model.atlas.neuron_in[1]: scaled}):
        expected = model.module(input_ids=IDS).logits
    with torch.no_grad(), delta.applied(model):
        torch.testing.assert_close(model.module(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert delta.outside(WeightMask.of_neurons(model.atlas, chosen, ("down",))) == 0


def test_a_closed_gate_row_silences_the_neuron() -> None:
    model = tiny_model("llama")
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[0, 5] = True
    delta = ScaleNeurons(part="gate").run(model, (), (), WeightMask.of_neurons(model.atlas, chosen))
    site = model.atlas.neuron_in[0]
    with torch.no_grad(), delta.applied(model), record(model.module, inputs=[site]) as seen:
        model.module(input_ids=IDS)
    assert seen.inputs[site][..., 5].abs().max() == 0
    assert seen.inputs[site][..., 6].abs().max() > 0


def test_a_mask_without_that_part_is_refused() -> None:
    model = tiny_model("llama")
    chosen = torch.ones(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    with pytest.raises(InputError, match="holds no down weights"):
        ScaleNeurons().run(model, (), (), WeightMask.of_neurons(model.atlas, chosen, ("up",)))
