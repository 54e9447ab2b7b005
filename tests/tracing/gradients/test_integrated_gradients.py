import pytest
import torch

from locus.errors import InputError
from locus.hooks import patched, record
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model
from tracing.gradients.integrated_gradients import (
    attribute_one_token,
    attribute_plainly,
    integrated_gradients,
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_shortcut_equals_whole_forwards(arch: str) -> None:
    model = tiny_model(arch)
    encoded = encode(model, tiny_facts()[0])
    seen, token = encoded.ids[: encoded.target_start], encoded.target_ids[0]
    plain = attribute_plainly(model, seen, token, 5)
    quick = attribute_one_token(model, seen, token, 5)
    assert plain.abs().max() > 1e-7
    torch.testing.assert_close(quick, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-4)


def test_small_batches_change_nothing() -> None:
    model = tiny_model("llama")
    encoded = encode(model, tiny_facts()[0])
    for engine in ("one-token", "plain"):
        whole = integrated_gradients(model, encoded, 4, engine=engine)
        pieces = integrated_gradients(model, encoded, 4, engine=engine, batch_tokens=1)
        torch.testing.assert_close(whole, pieces, atol=1e-9, rtol=1e-4)


def test_attributions_of_a_layer_add_up_to_what_its_neurons_do() -> None:
    """Completeness: with many points the sum over a layer is p(all its neurons) - p(none), at that position."""
    model = tiny_model("gpt2")
    encoded = encode(model, tiny_facts()[0])
    ids, token = torch.tensor([encoded.prompt_ids]), encoded.target_ids[0]
    layer, name = 1, model.atlas.neuron_in[1]

    def silence(h: torch.Tensor) -> torch.Tensor:
        return torch.cat([h[:, :-1], torch.zeros_like(h[:, -1:])], dim=1)

    with torch.no_grad():
        clean = model.module(ids).logits[0, -1].softmax(-1)[token]
        with patched(model.module, inputs={name: silence}):
            silent = model.module(ids).logits[0, -1].softmax(-1)[token]
    total = attribute_one_token(model, encoded.prompt_ids, token, 400)[layer].sum()
    assert float(total) == pytest.approx(float(clean - silent), rel=0.02, abs=1e-6)


def test_one_step_is_activation_times_gradient() -> None:
    """m = 1 looks at the activations themselves: h * dp/dh, computed here with plain autograd."""
    model = tiny_model("qwen3")
    encoded = encode(model, tiny_facts()[0])
    name = model.atlas.neuron_in[2]
    model.module.get_input_embeddings().weight.requires_grad_(True)
    with record(model.module, inputs=[name], detach=False) as seen:
        prob = (
            model.module(torch.tensor([encoded.prompt_ids])).logits[0, -1].softmax(-1)[encoded.target_ids[0]]
        )
        h = seen.inputs[name]
        (gradient,) = torch.autograd.grad(prob, h)
    model.module.get_input_embeddings().weight.requires_grad_(False)
    expected = (h * gradient)[0, -1].detach()
    got = attribute_one_token(model, encoded.prompt_ids, encoded.target_ids[0], 1)[2]
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-4)


def test_several_target_tokens_follow_the_gold_ones() -> None:
    model = tiny_model("llama")
    encoded = encode(model, tiny_facts()[1])
    assert encoded.n_target >= 2
    by_hand = [
        attribute_plainly(model, encoded.ids[:end], encoded.ids[end], 3)
        for end in range(encoded.target_start, len(encoded.ids))
    ]
    got = integrated_gradients(model, encoded, 3)
    torch.testing.assert_close(got, torch.stack(by_hand).mean(0), atol=1e-9, rtol=1e-4)


def test_refuses_what_makes_no_sense() -> None:
    model = tiny_model("llama")
    encoded = encode(model, tiny_facts()[0])
    with pytest.raises(InputError, match="at least 1"):
        integrated_gradients(model, encoded, 0)
