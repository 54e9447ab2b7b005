"""Whatever a checkpoint's file and its model do not agree on is refused: no weight is ever a random one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from locus.checkpoint import Checkpoint
from locus.cli import execute
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.fsdp_loader import _without_memory
from locus.mask import WeightMask, shapes_of
from locus.model import load_model
from locus.tokens import encode, encode_text
from locus.weight_checks import Agreement, refuse_disagreement
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

Tensors = dict[str, Tensor]
UP = "model.layers.0.mlp.up_proj.weight"


def _without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def _under(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def _with(**more: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _headless(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): value for name, value in tensors.items() if name != "lm_head.weight"}


def _classifier(tensors: Tensors) -> Tensors:
    return _without("lm_head")(tensors) | {"score.weight": torch.zeros(2, 32)}


def _lora(tensors: Tensors) -> Tensors:
    """An unmerged adapter saved with its base."""
    inner = {
        name.replace("q_proj.weight", "q_proj.base_layer.weight"): value for name, value in tensors.items()
    }
    return inner | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 32)}


def _cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name].mul(20).to(dtype)}


CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, object], str]] = {
    "head": ("llama", _without("lm_head"), {}, r"1 parameter .*\(lm_head\.weight\).*tie_word_embeddings"),
    "layer": (
        "llama",
        _without(r"layers\.1\."),
        {},
        r"9 parameters .*first is model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "part of a layer": ("qwen2", _without(r"layers\.2\.self_attn\.k_proj\.bias"), {}, r"1 parameter .*k_proj\.bias"),
    "headless": ("llama", _headless, {}, r"1 parameter .*no output head: save again from AutoModelForCausalLM"),
    "classifier": ("llama", _classifier, {}, r"lm_head\.weight.*classifier's \(it has score\.weight\)"),
    "DataParallel": ("llama", _under("module."), {}, r"30 parameters .*embed_tokens.*\"module\.\".*model\.module"),
    "compiled": ("llama", _under("_orig_mod."), {}, r"30 parameters .*\"_orig_mod\.\".*torch\.compile"),
    "PEFT": ("llama", _under("base_model.model."), {}, r"30 parameters .*merge_and_unload"),
    "PEFT inside": ("llama", _lora, {}, r"3 parameters .*q_proj\.weight.*merge_and_unload"),
    "tied, DataParallel": ("smollm", _under("module."), {}, r"29 parameters .*embed_tokens\.weight"),
    "another prefix": ("llama", _under("student."), {}, r'begin with "student\."'),
    "fewer layers": ("llama", _same, {"num_hidden_layers": 5}, r"18 parameters .*says 5 layers, the file has 3"),
    "more layers": ("llama", _same, {"num_hidden_layers": 2}, r"and 8 more.*says 2 layers, the file has 3"),
    "bias": (
        "llama",
        _with(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        {},
        r"q_proj\.bias, which the model would leave out",
    ),
    "shape": ("llama", lambda t: t | {UP: t[UP][1:].clone()}, {}, r"up_proj\.weight is \[47, 32\].*\[48, 32\]"),
    "vocabulary": ("llama", _same, {"vocab_size": 500}, r"embed_tokens\.weight is \[38\d, 32\].*\[500, 32\] \(2 param"),
    "int8": ("llama", _cast(UP, torch.int8), {}, r"up_proj\.weight is int8 .*codes.*quantization_config"),
    "uint8": ("gpt2", _cast("transformer.h.1.mlp.c_fc.weight", torch.uint8), {}, r"c_fc\.weight is uint8"),
    "LLM.int8": (
        "llama",
        lambda t: _cast(UP, torch.int8)(t) | {UP.replace("weight", "SCB"): torch.ones(48)},
        {},
        r"up_proj\.SCB.*codes of a quantized model",
    ),
    "fp8 with scales": (
        "llama",
        lambda t: _cast(UP, torch.float8_e4m3fn)(t) | {f"{UP}_scale": torch.ones(1)},
        {},
        r"weight_scale.*codes of a quantized model",
    ),
    "a method that nobody knows": (
        "llama",
        _cast(UP, torch.int8),
        {"quantization_config": {"quant_method": "ours"}},
        r"up_proj\.weight is int8",
    ),
    "GPTQ": (
        "llama",
        lambda t: _without(UP)(t)
        | {UP.replace("weight", "qweight"): torch.ones(4, 48, dtype=torch.int32)}
        | {UP.replace("weight", "scales"): torch.ones(1, 48)},
        {},
        r"up_proj\.(qweight|scales) and 1 more.*codes",
    ),
}  # fmt: skip


def _checkpoint(
    arch: str, change: Callable[[Tensors], Tensors], config: dict[str, object], place: Path
) -> Path:
    folder = save_tiny(tiny_model(arch), place / "m")
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_disagreement_is_refused_with_the_first_name_the_number_and_the_mend(case, tmp_path):
    *made, said = CASES[case]
    folder = _checkpoint(*made, tmp_path)
    with pytest.raises(InputError, match=said) as plain:
        load_model(folder)
    assert "\n" not in str(plain.value)
    with pytest.raises(InputError, match=said) as sharded:
        _refuse_by_names(folder)
    assert str(sharded.value) == str(plain.value)


def _refuse_by_names(folder: Path) -> None:
    """What the sharded loader does before it reads a tensor."""
    from transformers import AutoConfig

    module = _without_memory(AutoConfig.from_pretrained(folder), "auto", None, False)
    checkpoint = Checkpoint(folder)
    refuse_disagreement(Agreement.of_names(module, checkpoint), module, checkpoint, str(folder))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_whole_checkpoint_agrees(arch, tmp_path, recwarn):
    folder = save_tiny(tiny_model(arch), tmp_path / "m", shards=2)
    load_model(folder)
    _refuse_by_names(folder)
    assert not [one for one in recwarn if "left out" in str(one.message)]


@pytest.mark.parametrize(
    ("arch", "change"),
    [
        ("smollm", _headless),  # tied: the head is the embedding
        ("smollm", lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()}),
        ("gpt2", lambda t: {n.removeprefix("transformer."): v for n, v in t.items()}),
        ("gpt2", lambda t: t | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
        ("gpt2", lambda t: t | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}),
        ("llama", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("neox", lambda t: t | {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
    ],
    ids=["tied headless", "tied by the head", "bare gpt2", "causal mask", "masked bias", "inv_freq", "neox mask"],
)  # fmt: skip
def test_what_is_only_stored_otherwise_loads(arch, change, tmp_path, recwarn):
    model = tiny_model(arch)
    folder = _checkpoint(arch, change, {}, tmp_path)
    ids = torch.tensor([[1, 5, 9, 4]])
    assert torch.equal(load_model(folder).module(ids).logits, model.module(ids).logits)
    _refuse_by_names(folder)
    assert not [one for one in recwarn if "left out" in str(one.message)]


def test_what_is_no_part_of_the_model_is_left_out_with_a_note(tmp_path):
    folder = _checkpoint("llama", _with(v_head__summary__weight=torch.ones(1, 32)), {}, tmp_path)
    with pytest.warns(UserWarning, match=r"v_head\.summary\.weight, not part of this language model"):
        load_model(folder)


def test_the_command_line_exits_with_2_and_writes_nothing(tmp_path, capsys):
    folder = _checkpoint("llama", _without("lm_head"), {}, tmp_path)
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "The Eiffel Tower is in", "target": " Paris", "subject": "Eiffel Tower"}\n')
    assert execute(["trace", str(folder), str(facts), "-o", str(tmp_path / "out")]) == 2
    assert "lm_head.weight" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_token_without_an_embedding_row_is_named_before_anything_runs(tmp_path, capsys):
    model = tiny_model("llama")
    rows = len(model.tokenizer)
    folder = save_tiny(model, tmp_path / "m")
    model.tokenizer.add_tokens(["<|loc|>"])
    model.tokenizer.save_pretrained(folder)
    said = rf"token '<\|loc\|>' has id {rows}, the embedding has {rows} rows: resize"
    loaded = load_model(folder)
    encode(loaded, Example("The tower is in", " Paris"))
    with pytest.raises(InputError, match=f"line 3: {said}"):
        encode(loaded, Fact("a", "The <|loc|> tower is in", " Paris", source="facts.jsonl, line 3"))
    with pytest.raises(InputError, match=said):
        encode_text(loaded, "Some text <|loc|> and more")
    with pytest.raises(InputError, match=said):
        load_model(folder, bos="<|loc|>")
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt":"The <|loc|> tower is in","target":" Paris","subject":"tower"}\n')
    assert execute(["known", str(folder), str(facts)]) == 2
    assert re.search(said, capsys.readouterr().err)
    model.module.resize_token_embeddings(rows + 1)
    resized = load_model(save_tiny(model, tmp_path / "resized"))
    assert rows in encode(resized, Example("The <|loc|> tower is in", " Paris")).ids


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_but_no_edit_of_it_begins(dtype, tmp_path, capsys):
    folder = _checkpoint("llama", _cast(UP, dtype), {}, tmp_path)
    model = load_model(folder)
    shapes = shapes_of(model.module)
    down = "model.layers.0.mlp.down_proj.weight"
    WeightMask.of_parameters([down], shapes, model.fingerprint).check(model)
    mask = WeightMask.of_parameters([down, UP], shapes, model.fingerprint)
    said = rf"{re.escape(UP)} is stored as {str(dtype).removeprefix('torch.')}.*dense base"
    with pytest.raises(InputError, match=said):
        mask.check(model)
    mask.save(tmp_path / "mask.safetensors")
    command = ["edit", str(folder), "demo-forget", "--mask", str(tmp_path / "mask.safetensors")]
    assert execute([*command, "--method", "npo", "-o", str(tmp_path / "edit")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "edit" / "delta.safetensors").exists()


def test_no_key_value_edit_of_float8_begins(tmp_path, capsys):
    folder = _checkpoint(
        "llama", _cast("model.layers.1.mlp.down_proj.weight", torch.float8_e4m3fn), {}, tmp_path
    )
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt":"The Eiffel Tower is in","target":" Paris","subject":"Eiffel Tower"}\n')
    assert execute(["edit", str(folder), str(facts), "-o", str(tmp_path / "edit")]) == 2
    assert "layers.1.mlp.down_proj.weight is stored as float8_e4m3fn" in capsys.readouterr().err


def test_a_quantized_checkpoint_without_its_package_is_one_line(tmp_path, capsys):
    methods = {"bitsandbytes": {"load_in_4bit": True}, "gptq": {"bits": 4}, "compressed-tensors": {}}
    for method, settings in methods.items():
        config = {"quantization_config": {"quant_method": method, **settings}}
        folder = _checkpoint("llama", _same, config, tmp_path / method)
        with pytest.raises(InputError, match=r"install") as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
