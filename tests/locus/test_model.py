"""Loading: folders, dtypes, BOS settings, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import locus
from locus import embedded
from locus.errors import InputError
from locus.model import load_model, load_shape
from locus.quiet_stderr import unheard
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(tiny_model("llama"), path)
    return path


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy of the folder, to be broken."""
    return shutil.copytree(folder, tmp_path / "damaged")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "smollm"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_model_loads_to_the_same_logits(arch, shards, tmp_path):
    model = tiny_model(arch)
    save_tiny(model, tmp_path / "m", shards=shards)
    loaded = load_model(tmp_path / "m")
    ids = torch.tensor([[1, 5, 9, 4]])
    assert torch.equal(loaded.module(ids).logits, model.module(ids).logits)
    assert loaded.atlas == model.atlas
    assert loaded.fingerprint == model.fingerprint
    assert not any(p.requires_grad for p in loaded.module.parameters())


def test_auto_dtype_is_float32_on_a_cpu_whatever_the_checkpoint_holds(tmp_path):
    model = tiny_model("llama")
    model.module.to(torch.bfloat16)
    save_tiny(model, tmp_path / "m")
    assert load_model(tmp_path / "m").dtype == torch.float32
    assert load_model(tmp_path / "m", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(tmp_path / "m").fingerprint == load_model(tmp_path / "m", dtype="bfloat16").fingerprint


def test_bos_settings(folder):
    tokenizer = load_model(folder).tokenizer
    start = tokenizer.convert_tokens_to_ids("<s>")
    assert load_model(folder).bos == start
    assert load_model(folder, bos="none").bos is None
    assert load_model(folder, bos="</s>").bos == tokenizer.convert_tokens_to_ids("</s>")
    assert load_model(folder, bos="3").bos == 3
    for wrong in ("<nope>", "99999"):
        with pytest.raises(InputError, match="--bos"):
            load_model(folder, bos=wrong)


def test_a_wrong_name_says_what_can_be_given(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match="is a folder"):
        (tmp_path / "file").write_text("x")
        load_model(tmp_path / "file")
    with pytest.raises(InputError, match="smollm2"):
        load_model("smollm3")


def test_settings_that_do_not_exist(folder):
    with pytest.raises(InputError, match="float8"):
        load_model(folder, dtype="float8")
    with pytest.raises(InputError, match="device"):
        load_model(folder, device="warp")
    with pytest.raises(InputError, match="nonsense"):
        load_model(folder, attn_implementation="nonsense")


def test_nan_weights_are_named(damaged):
    path = damaged / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        load_model(damaged)


def test_a_truncated_checkpoint_is_named(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(damaged)


def test_a_folder_without_weights_or_config(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_model(damaged)


def test_a_tokenizer_that_panics_is_one_line_and_nothing_else_on_the_terminal(damaged, capfd):
    path = damaged / "tokenizer.json"
    spoilt = json.loads(path.read_text())
    spoilt["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(spoilt))
    with pytest.raises(InputError, match="cannot load it"):
        load_model(damaged)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_called_one(damaged, name):
    (damaged / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n")
    for read in (load_model, load_shape):
        with pytest.raises(InputError, match=rf"{name}: a Git LFS pointer, not the file itself"):
            read(damaged)


def test_a_folder_without_a_tokenizer_says_so(damaged):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    with pytest.raises(InputError, match="there is no tokenizer in the folder"):
        load_model(damaged)


def test_remote_code_names_the_option(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "cfg.C", "AutoModelForCausalLM": "mod.M"}}
    (damaged / "config.json").write_text(json.dumps(config))
    for name in ("cfg.py", "mod.py"):
        (damaged / name).write_text("")
    with pytest.raises(InputError, match="add --trust-remote-code"):
        load_model(damaged)


def test_a_long_message_ends(damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(InputError, match=r"Unrecognized configuration class .* …$"):
        load_model(damaged)


def test_what_is_held_back_from_the_terminal_comes_out_when_all_went_well(capfd):
    with unheard():
        os.write(2, b"a warning\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a warning\n"


def test_another_kind_of_model_is_refused(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["model_type"] = "no-such-type"
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load it"):
        load_model(damaged)


def test_bridge_is_over_a_copy():
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    ids = torch.tensor([[1, 5, 9, 4]])
    expected = model.module(ids).logits
    bridge = locus.bridge(model)
    assert isinstance(bridge, TransformerBridge)
    assert torch.allclose(bridge(ids), expected, atol=1e-4)
    after = model.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_embedded_model_says_how_to_mend_a_failed_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCUS_SMOLLM2_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(InputError, match="no such file"):
        embedded.embedded_folder()
    wheel = tmp_path / "bad.whl"
    wheel.write_bytes(b"not a zip")
    monkeypatch.setenv("LOCUS_SMOLLM2_WHEEL", str(wheel))
    with pytest.raises(InputError, match="not the wheel"):
        embedded.embedded_folder()
    monkeypatch.delenv("LOCUS_SMOLLM2_WHEEL")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        embedded.embedded_folder()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def test_import_is_light():
    import subprocess
    import sys

    code = "import locus, sys; print([m for m in ('torch', 'transformers', 'transformer_lens') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
