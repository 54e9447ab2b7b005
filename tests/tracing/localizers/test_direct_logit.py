import pytest
import torch

from locus.hooks import record
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model
from tracing.localizers.direct_logit import DirectLogit, direct_attribution


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shares_add_up_to_the_logit(arch: str) -> None:
    settings = {"final_logit_softcapping": None} if arch == "gemma2" else {}
    model = tiny_model(arch, **settings)
    encoded = encode(model, tiny_facts()[0])
    with torch.no_grad():
        logits = model.module(torch.tensor([encoded.prompt_ids])).logits[0, -1]
    expected = float(logits[encoded.target_ids[0]] - logits.mean())
    assert direct_attribution(model, encoded).logit == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gemma3", "olmo2"])
def test_heads_and_neurons_add_up_to_their_layer(arch: str) -> None:
    """These have no output biases, so nothing is left over."""
    shares = direct_attribution(tiny_model(arch), encode(tiny_model(arch), tiny_facts()[0]))
    torch.testing.assert_close(shares.head.sum(1), shares.attn, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shares.neuron.sum(1), shares.mlp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["olmo", "cohere", "gpt2", "llama"])
def test_parts_go_through_the_norm_with_its_scale_held(arch: str) -> None:
    """Share = d . J x_part, J the final norm's map with its scale held, centring found by differencing."""
    model = tiny_model(arch)
    encoded = encode(model, tiny_facts()[0])
    norm, head = (model.module.get_submodule(n) for n in (model.atlas.final_norm, model.atlas.unembed))
    with torch.no_grad(), record(model.module, [*model.atlas.mlp_out], [model.atlas.final_norm]) as seen:
        model.module(torch.tensor([encoded.prompt_ids]))
    x = seen.inputs[model.atlas.final_norm][0, -1]
    weight = torch.ones_like(x) if getattr(norm, "weight", None) is None else norm.weight.detach()
    bias = 0 if getattr(norm, "bias", None) is None else norm.bias.detach()
    centre = arch != "llama"
    whole = norm(x[None])[0].detach() - bias
    scale = (whole / weight / (x - x.mean() * centre)).median()
    wanted = head.weight[encoded.target_ids[0]] - head.weight.mean(0)
    shares = direct_attribution(model, encoded)
    for layer, name in enumerate(model.atlas.mlp_out):
        part = seen.outputs[name][0, -1]
        expected = (wanted * weight * scale) @ (part - part.mean() * centre)
        assert float(shares.mlp[layer]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_one_neuron_by_hand() -> None:
    """Llama: share = h * v . (gamma / rms) . (W_U[target] - mean W_U)."""
    model = tiny_model("llama")
    encoded = encode(model, tiny_facts()[0])
    seen = {}
    down = model.module.model.layers[1].mlp.down_proj
    hooks = [
        down.register_forward_pre_hook(lambda _, args: seen.update(h=args[0])),
        model.module.model.norm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0])),
    ]
    with torch.no_grad():
        model.module(torch.tensor([encoded.prompt_ids]))
    for hook in hooks:
        hook.remove()
    x, norm = seen["x"][0, -1], model.module.model.norm
    scale = norm.weight / (x.pow(2).mean() + norm.variance_epsilon).sqrt()
    unembedding = model.module.lm_head.weight
    direction = scale * (unembedding[encoded.target_ids[0]] - unembedding.mean(0))
    expected = seen["h"][0, -1, 5] * (down.weight[:, 5] @ direction)
    got = DirectLogit().run(model, [tiny_facts()[0]]).values[1, 5]
    assert float(got) == pytest.approx(float(expected), rel=1e-4)
