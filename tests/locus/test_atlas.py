"""Every name of the atlas, held against the numbers of the model it names."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.activations import ACT2FN

from locus.atlas import Atlas
from locus.atlas_checks import check_values
from locus.atlas_reader import read_atlas
from locus.errors import InputError
from locus.hooks import patched, record
from locus.model import Model, bridge
from tests import tiny
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model, tiny_module

ACTIVATION = {
    "gemma2": "gelu_pytorch_tanh",
    "gemma3": "gelu_pytorch_tanh",
    "gpt2": "gelu_new",
    "neox": "gelu",
    "gptj": "gelu_new",
    "phi": "gelu_new",
    "opt": "relu",
    "falcon": "gelu",
}
PARALLEL = {"neox", "gptj", "phi", "falcon"}

zoo = pytest.mark.parametrize("arch", ARCHITECTURES)


def two_prompts(model: Model) -> dict[str, Tensor]:
    """Two prompts of different length, right padded."""
    batch: dict[str, Tensor] = dict(
        model.tokenizer([fact.prompt for fact in tiny_facts()[:2]], padding=True, return_tensors="pt")
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def assert_adds_up(model: Model) -> None:
    """block output = block input + attn_out + mlp_out, to rounding, at every layer and position."""
    atlas = model.atlas
    outputs = [*atlas.blocks, *atlas.attn_out, *atlas.mlp_out]
    with torch.no_grad(), record(model.module, outputs, atlas.blocks) as seen:
        model.module(**two_prompts(model))
    for block, attn, mlp in zip(atlas.blocks, atlas.attn_out, atlas.mlp_out, strict=True):
        total = seen.inputs[block] + seen.outputs[attn] + seen.outputs[mlp]
        torch.testing.assert_close(seen.outputs[block], total, rtol=1e-6, atol=2e-6)
        assert seen.outputs[attn].abs().mean() > 0.01 and seen.outputs[mlp].abs().mean() > 0.01


def assert_activations_follow(model: Model, activation: str) -> None:
    """Each neuron's activation, recomputed one neuron at a time from the parts that the atlas lists."""
    atlas, parameters = model.atlas, dict(model.module.named_parameters())
    projection = [parts[0].param.removesuffix(".weight") for parts in atlas.neurons]
    with torch.no_grad(), record(model.module, inputs=[*projection, *atlas.neuron_in]) as seen:
        model.module(**two_prompts(model))
    for layer, parts in enumerate(atlas.neurons):
        x, expected = seen.inputs[projection[layer]], seen.inputs[atlas.neuron_in[layer]]
        for i in range(atlas.d_mlp):
            own = {part.role: parameters[part.param].select(part.axis, part.offset + i) for part in parts}
            up = x @ own["up"] + own.get("up_bias", 0)
            if "gate" in own:
                actual = ACT2FN[activation](x @ own["gate"] + own.get("gate_bias", 0)) * up
            else:
                actual = ACT2FN[activation](up)
            torch.testing.assert_close(actual, expected[..., i], rtol=1e-4, atol=1e-5)


@zoo
def test_blocks_add_exactly_attention_and_mlp(arch: str) -> None:
    assert_adds_up(tiny_model(arch))


@zoo
def test_activations_follow_from_the_neurons_parts(arch: str) -> None:
    assert_activations_follow(tiny_model(arch), ACTIVATION.get(arch, "silu"))


@zoo
def test_zeroing_a_down_column_is_zeroing_the_activation(arch: str) -> None:
    model = tiny_model(arch)
    inputs = two_prompts(model)
    layer, neuron = 1, 17
    (down,) = [part for part in model.atlas.neurons[layer] if part.role == "down"]

    def silence(activations: Tensor) -> Tensor:
        activations = activations.clone()
        activations[..., neuron] = 0
        return activations

    with torch.no_grad():
        plain = model.module(**inputs).logits
        with patched(model.module, inputs={model.atlas.neuron_in[layer]: silence}):
            silenced = model.module(**inputs).logits
        model.module.get_parameter(down.param).select(down.axis, down.offset + neuron).zero_()
        zeroed = model.module(**inputs).logits
    torch.testing.assert_close(zeroed, silenced, rtol=1e-5, atol=1e-5)
    assert (silenced - plain).abs().max() > 1e-3


@zoo
def test_sizes_are_the_configurations(arch: str) -> None:
    model = tiny_model(arch)
    atlas, config = model.atlas, model.module.config
    with torch.no_grad(), record(model.module, [*atlas.blocks], [*atlas.attn_z, *atlas.neuron_in]) as seen:
        logits = model.module(**two_prompts(model)).logits
    grouped = arch not in {"gpt2", "neox", "gptj", "opt", "falcon"}
    assert atlas.architecture == type(model.module).__name__
    assert (atlas.n_layers, atlas.d_model, atlas.d_mlp, atlas.n_heads) == (3, 32, 48, 4)
    assert atlas.n_kv_heads == (2 if grouped else 1 if arch == "falcon" else 4)
    assert atlas.d_head == (16 if arch in {"qwen3", "gemma2", "gemma3"} else 8)
    assert atlas.d_vocab == config.vocab_size == logits.shape[-1]
    assert atlas.parallel == (arch in PARALLEL)
    for layer in range(3):
        assert seen.inputs[atlas.attn_z[layer]].shape[-1] == atlas.n_heads * atlas.d_head
        assert seen.inputs[atlas.neuron_in[layer]].shape[-1] == atlas.d_mlp
    assert model.module.get_submodule(atlas.embed) is model.module.get_input_embeddings()
    assert model.module.get_submodule(atlas.unembed) is model.module.get_output_embeddings()


@zoo
def test_final_norm_stands_between_the_last_block_and_the_unembedding(arch: str) -> None:
    model = tiny_model(arch)
    atlas = model.atlas
    with torch.no_grad(), record(model.module, [atlas.blocks[-1], atlas.final_norm], [atlas.unembed]) as seen:
        model.module(**two_prompts(model))
        expected = model.module.get_submodule(atlas.final_norm)(seen.outputs[atlas.blocks[-1]])
    assert torch.equal(seen.inputs[atlas.unembed], expected)
    assert torch.equal(seen.outputs[atlas.final_norm], expected)


@zoo
def test_values_equal_a_transformer_bridge(arch: str) -> None:
    """Every site of every layer under its TransformerLens name, on a bridge over a copy."""
    model = tiny_model(arch)
    atlas, twin = model.atlas, bridge(model)
    ids = model.tokenizer(tiny_facts()[0].prompt, return_tensors="pt").input_ids
    outputs = {"resid_post": atlas.blocks, "attn_out": atlas.attn_out, "mlp_out": atlas.mlp_out}
    inputs = {"resid_pre": atlas.blocks, "z": atlas.attn_z, "mlp_post": atlas.neuron_in}
    named_out = [name for names in outputs.values() for name in names]
    named_in = [name for names in inputs.values() for name in names]
    with torch.no_grad():
        logits, cache = twin.run_with_cache(ids)
        with record(model.module, named_out, named_in) as seen:
            ours = model.module(ids).logits
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=5e-5)
    for sites, recorded in ((outputs, seen.outputs), (inputs, seen.inputs)):
        for site, names in sites.items():
            for layer, name in enumerate(names):
                theirs = cache[atlas.hook_name(site, layer)]  # type: ignore[arg-type]
                theirs = theirs.flatten(2) if theirs.dim() == 4 else theirs  # z by heads
                torch.testing.assert_close(recorded[name], theirs, rtol=1e-4, atol=5e-5)


@zoo
def test_json_round_trip(arch: str) -> None:
    atlas = tiny_model(arch).atlas
    again = Atlas.from_json(json.loads(json.dumps(atlas.to_json())))
    assert again == atlas and hash(again) == hash(atlas)


@zoo
def test_same_atlas_in_half_precision(arch: str) -> None:
    """The proof allows for each dtype's own rounding, no more."""
    module = tiny_module(arch)
    expected = read_atlas(module)
    assert read_atlas(module.to(torch.bfloat16)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_same_atlas_in_other_precisions(dtype: torch.dtype) -> None:
    module = tiny_module("gemma2")
    expected = read_atlas(module)
    assert read_atlas(module.to(dtype)) == expected


@zoo
def test_same_atlas_without_weights(arch: str) -> None:
    """On the meta device names and shapes are checked, and nothing is run."""
    module = tiny_module(arch)
    assert read_atlas(copy.deepcopy(module).to("meta")) == read_atlas(module)


def test_reading_leaves_the_model_as_it_was() -> None:
    module = tiny_module("neox").train()
    module.get_submodule("gpt_neox.layers.1").eval()
    modes = {name: part.training for name, part in module.named_modules()}
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    config, generator = copy.deepcopy(module.config.to_dict()), torch.get_rng_state()
    read_atlas(module)
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert module.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(module.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


# Variants of the families, each of which moves a name or a number.

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("arch", "settings", "activation", "expected"),
    [
        ("llama", {"mlp_bias": True, "attention_bias": True}, "silu", {"parallel": False}),
        ("llama", {"head_dim": 12}, "silu", {"d_head": 12}),
        ("gpt2", {"n_inner": None}, "gelu_new", {"d_mlp": 128}),
        ("neox", {"use_parallel_residual": False}, "gelu", {"parallel": False}),
        ("opt", {"enable_bias": False}, "relu", {"parallel": False}),
        (
            "falcon",  # the 40B's blocks: two norms, grouped heads (its config says multi_query all the same)
            {"new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 2},
            "gelu",
            {"n_kv_heads": 2, "parallel": True},
        ),
        (
            "falcon",  # falcon-rw
            {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
            "gelu",
            {"n_kv_heads": 4, "parallel": False},
        ),
    ],
)
def test_variants(arch: str, settings: dict, activation: str, expected: dict) -> None:
    model = tiny_model(arch, **settings)
    assert {name: getattr(model.atlas, name) for name in expected} == expected
    assert_adds_up(model)
    assert_activations_follow(model, activation)


_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}

OTHERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("GlmConfig", "GlmForCausalLM", {**_SMALL, "head_dim": 8}, {"n_kv_heads": 2}),
    (
        "BloomConfig",  # adds the residual inside its attention and MLP modules
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97},
        {"attn_out": tuple(f"transformer.h.{i}.self_attention.dense" for i in range(2))},
    ),
    ("CohereConfig", "CohereForCausalLM", _SMALL, {"parallel": True}),
    ("StableLmConfig", "StableLmForCausalLM", {**_SMALL, "use_parallel_residual": True}, {"parallel": True}),
    ("Starcoder2Config", "Starcoder2ForCausalLM", _SMALL, {"parallel": False}),
    (
        "Gemma3Config",  # the text model inside an image-and-text one
        "Gemma3ForConditionalGeneration",
        {"text_config": {**_SMALL, "head_dim": 8}, "vision_config": _VISION, "mm_tokens_per_image": 4},
        {"blocks": tuple(f"model.language_model.layers.{i}" for i in range(2)), "unembed": "lm_head"},
    ),
]


@pytest.mark.parametrize(("config", "model", "settings", "expected"), OTHERS)
def test_other_architectures_are_named_and_proved(
    config: str, model: str, settings: dict, expected: dict
) -> None:
    """Beyond the zoo, whatever TransformerLens names and the proof in `read_atlas` holds for."""
    module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    tiny.randomize_(module, seed=0)
    atlas = read_atlas(module)
    assert {name: getattr(atlas, name) for name in expected} == expected


def test_biases_belong_to_their_neuron() -> None:
    parts = tiny_model("llama", mlp_bias=True).atlas.neurons[0]
    assert [part.role for part in parts] == ["gate", "gate_bias", "up", "up_bias", "down"]
    assert not any(part.param.endswith("down_proj.bias") for part in parts)


def test_phi3_holds_gate_rows_before_up_rows() -> None:
    gate, up, down = tiny_model("phi3").atlas.neurons[2]
    assert gate.param == up.param == "model.layers.2.mlp.gate_up_proj.weight"
    assert (gate.role, gate.axis, gate.offset) == ("gate", 0, 0)
    assert (up.role, up.axis, up.offset) == ("up", 0, 48)
    assert (down.param, down.axis) == ("model.layers.2.mlp.down_proj.weight", 1)


def test_gpt2_holds_neurons_the_other_way_round() -> None:
    up, bias, down = tiny_model("gpt2").atlas.neurons[0]
    assert (up.param, up.axis) == ("transformer.h.0.mlp.c_fc.weight", 1)
    assert (bias.param, bias.axis) == ("transformer.h.0.mlp.c_fc.bias", 0)
    assert (down.param, down.axis) == ("transformer.h.0.mlp.c_proj.weight", 0)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "olmo2"])
def test_post_norms_are_what_is_added(arch: str) -> None:
    atlas = tiny_model(arch).atlas
    assert atlas.attn_out[0] == "model.layers.0.post_attention_layernorm" != atlas.attn[0]
    assert atlas.mlp_out[0] == "model.layers.0.post_feedforward_layernorm" != atlas.mlp[0]


def test_opt_has_no_mlp_module() -> None:
    atlas = tiny_model("opt").atlas
    assert atlas.mlp == atlas.mlp_out == atlas.neuron_in
    assert atlas.mlp[1] == "model.decoder.layers.1.fc2"


# What has no exact name is refused.

_OPT = {**tiny._ZOO["opt"][2], "vocab_size": 97}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 4}

REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("MixtralConfig", "MixtralForCausalLM", {**_SMALL, "num_local_experts": 4}, "mlp.out.*MixtralExperts"),
    ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_SMALL, **_EXPERTS}, "mlp.out.*mixture of experts"),
    ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_SMALL, **_EXPERTS}, "mlp.out.*mixture of experts"),
    ("MambaConfig", "MambaForCausalLM", _MAMBA, "backbone.layers.0 is recurrent"),
    ("RwkvConfig", "RwkvForCausalLM", {**_SMALL, "attention_hidden_size": 32}, "rwkv.blocks.0 is recurrent"),
    ("JambaConfig", "JambaForCausalLM", {**_SMALL, "num_hidden_layers": 8, "num_experts": 2}, "is recurrent"),
    (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_SMALL, **_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        "(Experts|DeltaNet) in model.layers.0",
    ),
    (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_SMALL, "residual_multiplier": 0.2},
        "hook_attn_out.*rescales",
    ),
    ("BitNetConfig", "BitNetForCausalLM", _SMALL, "one row per neuron"),
    ("OPTConfig", "OPTForCausalLM", {**_OPT, "do_layer_norm_before": False}, "ln_final"),
    ("OPTConfig", "OPTForCausalLM", {**_OPT, "word_embed_proj_dim": 16}, "ln_final"),
    ("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "d_ff": 48, "num_layers": 2}, "one stack"),
    ("BertConfig", "BertLMHeadModel", {**_SMALL, "is_decoder": True}, "post-norm"),
    ("CTRLConfig", "CTRLLMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48}, "no adapter"),
]


@pytest.mark.parametrize(("config", "model", "settings", "reason"), REFUSED)
def test_refused_by_name(config: str, model: str, settings: dict, reason: str) -> None:
    """In one line that names the architecture, the part, and what can still be done."""
    module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    with pytest.raises(InputError, match=reason) as error:
        read_atlas(module)
    message = str(error.value)
    assert message.startswith(model) and "\n" not in message
    assert "can still be compared" in message


def test_quantized_weights_are_refused() -> None:
    module = tiny_module("llama")
    down = module.get_submodule("model.layers.0.mlp.down_proj")
    down.weight = torch.nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.mlp\.down_proj \(Linear\).*load the model unquantized"
    ):
        read_atlas(module)


def test_layers_of_different_width_are_refused() -> None:
    module = tiny_module("llama")
    module.get_submodule("model.layers.2").mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj maps 32 to 40, expected 32 to 48"):
        read_atlas(module)


def test_damaged_weights_are_named() -> None:
    module = tiny_module("llama")
    module.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.1 computes NaN or infinity"):
        read_atlas(module)


def wrong(atlas: Atlas, **changes: Any) -> Atlas:
    return dataclasses.replace(atlas, **changes)


def swapped(atlas: Atlas) -> Atlas:
    """Gate and up mistaken for one another."""
    role = {"gate": "up", "up": "gate"}
    layers = [
        [dataclasses.replace(p, role=role.get(p.role, p.role)) for p in parts] for parts in atlas.neurons
    ]
    return wrong(atlas, neurons=tuple(tuple(parts) for parts in layers))


@pytest.mark.parametrize(
    ("arch", "mistake", "reason"),
    [
        ("gemma2", lambda a: wrong(a, attn_out=a.attn), "is not its input"),
        ("gemma3", lambda a: wrong(a, mlp_out=a.mlp), "is not its input"),
        ("olmo2", lambda a: wrong(a, mlp_out=a.mlp), "is not its input"),
        ("opt", lambda a: wrong(a, mlp_out=a.blocks), "is not its input"),
        ("llama", lambda a: wrong(a, attn_out=a.attn_out[::-1]), "is not its input"),
        ("llama", swapped, "one row per neuron"),
        ("phi3", swapped, "one row per neuron"),
    ],
)
def test_a_false_atlas_is_caught(arch: str, mistake: Any, reason: str) -> None:
    module = tiny_module(arch)
    atlas = read_atlas(module)
    with pytest.raises(InputError, match=reason):
        check_values(mistake(atlas), module)


# Names in TransformerLens' vocabulary, and the JSON form.


def test_hook_names() -> None:
    atlas = tiny_model("llama").atlas
    assert atlas.hook_name("resid_pre", 0) == "blocks.0.hook_resid_pre"
    assert atlas.hook_name("resid_post", 2) == "blocks.2.hook_resid_post"
    assert atlas.hook_name("attn_out", 1) == "blocks.1.hook_attn_out"
    assert atlas.hook_name("mlp_out", 1) == "blocks.1.hook_mlp_out"
    assert atlas.hook_name("z", 1) == "blocks.1.attn.hook_z"
    assert atlas.hook_name("mlp_post", 1) == "blocks.1.mlp.hook_post"
    with pytest.raises(InputError, match="layers 0 to 2"):
        atlas.hook_name("mlp_post", 3)


def test_json_of_something_else_is_refused() -> None:
    obj = tiny_model("llama").atlas.to_json()
    del obj["attn_z"]
    with pytest.raises(InputError, match="attn_z"):
        Atlas.from_json(obj)
    with pytest.raises(InputError, match="colour"):
        Atlas.from_json({**obj, "attn_z": [], "colour": 1})


@pytest.mark.parametrize("spoilt", [{"offset": -1}, {"offset": 7}, {"axis": 2}, {"axis": -1}])
def test_neurons_outside_their_projection_are_refused(spoilt: dict[str, int]) -> None:
    said = json.loads(json.dumps(tiny_model("llama").atlas.to_json()))
    said["neurons"][0][0] |= spoilt
    with pytest.raises(InputError, match="has no neurons at"):
        Atlas.from_json(said)


def test_neurons_on_both_axes_of_a_parameter_are_refused() -> None:
    said = json.loads(json.dumps(tiny_model("llama").atlas.to_json()))
    gate, *_, down = said["neurons"][0]
    assert gate["axis"] != down["axis"]
    down["param"] = gate["param"]
    with pytest.raises(InputError, match="on both axes"):
        Atlas.from_json(said)
