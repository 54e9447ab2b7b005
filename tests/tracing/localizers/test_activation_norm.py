import pytest
import torch

from locus.fact import Example
from locus.hooks import record
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_model
from tracing.localizers.activation_norm import ActivationNorm, down_norms

FACTS = [Example("The capital of France is", " Paris"), Example("Rome", " is the capital of Italy")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_the_norm_of_what_each_neuron_writes(arch: str) -> None:
    """|h| * ||v|| is the norm of the vector that neuron adds; taken here one neuron at a time."""
    model = tiny_model(arch)
    scores = ActivationNorm().run(model, FACTS).values
    layer, neuron = model.atlas.n_layers - 1, 5
    name = model.atlas.neuron_in[layer]
    down = model.module.get_submodule(name)
    sizes = []
    for fact in FACTS:
        encoded = encode(model, fact)
        with torch.no_grad(), record(model.module, inputs=[name]) as seen:
            model.module(torch.tensor([encoded.ids]))
        h = seen.inputs[name][0]
        only = torch.zeros_like(h)
        only[:, neuron] = h[:, neuron]
        with torch.no_grad():
            written = down(only) - down(torch.zeros_like(h))
        where = slice(encoded.target_start - 1, len(encoded.ids) - 1)
        sizes.append(written[where].norm(dim=-1).mean())
    assert float(scores[layer, neuron]) == pytest.approx(float(sum(sizes)) / len(sizes), rel=1e-3)


def test_padding_is_not_counted() -> None:
    model = tiny_model("llama")
    for positions in ("all", "prediction"):
        localizer = ActivationNorm(positions=positions)
        alone = sum(localizer.run(model, [fact]).values for fact in FACTS) / 2
        torch.testing.assert_close(localizer.run(model, FACTS).values, alone, atol=1e-7, rtol=1e-4)


def test_down_norms_are_columns_of_the_down_projection() -> None:
    model = tiny_model("llama")
    weight = model.module.get_submodule(model.atlas.neuron_in[0]).weight
    torch.testing.assert_close(down_norms(model)[0], weight.norm(dim=0))
    conv = tiny_model("gpt2")
    weight = conv.module.get_submodule(conv.atlas.neuron_in[0]).weight
    torch.testing.assert_close(down_norms(conv)[0], weight.norm(dim=1))
