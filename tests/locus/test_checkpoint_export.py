"""Checkpoint folders: what is read, refused, exported, reverted and compared."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from locus.checkpoint_export import Checkpoint, diff, export, fingerprint_of, revert
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.files.tensorfile import TensorFile
from locus.mask import WeightMask
from locus.selection import Selection
from tests.tiny import ARCHITECTURES, save_tiny, tiny_model

IDS = torch.tensor([[1, 5, 9, 30, 2]])


def _folder(
    path: Path, tensors: dict[str, Tensor], shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A bare checkpoint folder, written with the reference library."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def _tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{i}.mlp.{part}.weight": torch.randn(shape, generator=generator).bfloat16()
        for i in range(3)
        for part, shape in (("up_proj", (12, 8)), ("down_proj", (8, 12)))
    } | {
        "model.norm.weight": torch.ones(8),
        "model.embed_tokens.weight": torch.randn(20, 8, generator=generator),
    }


def _delta(tensors: dict[str, Tensor], *names: str) -> WeightDelta:
    after = {name: tensors[name].clone() for name in names}
    for tensor in after.values():
        tensor[1] += 1
    return WeightDelta.between(tensors, after)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- reading


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_folder_and_memory_have_one_fingerprint(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    save_tiny(model, tmp_path / "one")
    save_tiny(model, tmp_path / "three", shards=3)
    want = fingerprint_of(model.module)
    assert Checkpoint(tmp_path / "one").fingerprint() == want
    assert Checkpoint(tmp_path / "three").fingerprint() == want
    checkpoint = Checkpoint(tmp_path / "three")
    for name, parameter in model.module.named_parameters():
        assert torch.equal(checkpoint.tensor(name), parameter)


def test_a_fingerprint_sees_every_bit_name_dtype_and_shape(tmp_path: Path) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    flipped = {**base, "a": base["a"].clone()}
    flipped["a"][1, 2] = -0.0
    variants = [
        base,
        flipped,
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    prints = {Checkpoint(_folder(tmp_path / str(i), v)).fingerprint() for i, v in enumerate(variants)}
    assert len(prints) == len(variants)


def test_hub_gpt2_layout(tmp_path: Path) -> None:
    """The hub's gpt2: no prefix, causal masks beside the weights. Same fingerprint, names found both ways."""
    model = tiny_model("gpt2")
    bare = {n.removeprefix("transformer."): p.detach().clone() for n, p in model.module.named_parameters()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(3)}
    folder = _folder(tmp_path / "hub", bare | masks)
    checkpoint = Checkpoint(folder)
    assert checkpoint.fingerprint() == fingerprint_of(model.module)
    assert checkpoint.resolve("transformer.h.1.mlp.c_fc.weight") == "h.1.mlp.c_fc.weight"
    assert checkpoint.places("lm_head.weight") == ("wte.weight",)
    assert checkpoint.places("transformer.wte.weight") == ("wte.weight",)
    with pytest.raises(InputError, match=r"holds no tensor transformer\.h\.9"):
        checkpoint.resolve("transformer.h.9.mlp.c_fc.weight")


def test_a_tied_head_that_is_stored_twice_counts_once_and_is_edited_twice(tmp_path: Path) -> None:
    model = tiny_model("smollm")
    save_tiny(model, tmp_path / "once")
    tensors = load_file(tmp_path / "once" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    save_file(
        {**tensors, "lm_head.weight": embedding.clone()},
        tmp_path / "twice" / "model.safetensors",
        metadata={"format": "pt"},
    )
    twice = Checkpoint(tmp_path / "twice")
    assert twice.fingerprint() == Checkpoint(tmp_path / "once").fingerprint() == model.fingerprint
    delta = _delta(tensors, "model.embed_tokens.weight")
    export(tmp_path / "twice", delta, tmp_path / "out")
    out = Checkpoint(tmp_path / "out")
    assert torch.equal(out.tensor("lm_head.weight"), out.tensor("model.embed_tokens.weight"))
    assert not torch.equal(out.tensor("lm_head.weight"), embedding)
    config = json.loads((tmp_path / "twice" / "config.json").read_text())
    for tie, places in ((False, 1), (None, 1), (True, 2)):
        config = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
        config |= {} if tie is None else {"tie_word_embeddings": tie}
        (tmp_path / "twice" / "config.json").write_text(json.dumps(config))
        found = Checkpoint(tmp_path / "twice").places("model.embed_tokens.weight")
        assert len(found) == places, "where the configuration is silent its class decides: Llama does not tie"


def test_ambiguous_names_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "f", {"model.a": torch.zeros(1), "transformer.a": torch.zeros(1)})
    with pytest.raises(InputError, match=r"tensor a could be any of model\.a, transformer\.a"):
        Checkpoint(folder).resolve("a")


def _index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_folders_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path) -> None:
    good = _folder(tmp_path / "good", _tensors(), shards=2)
    weight_map = json.loads((good / "model.safetensors.index.json").read_text())["weight_map"]
    shard = sorted(set(weight_map.values()))[0]

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    cases: list[tuple[Path, str]] = [(tmp_path / "nowhere", "no such folder"), (good / shard, "is a file")]
    folder = broken("missing")
    (folder / shard).unlink()
    cases.append((folder, "1 shards are missing"))
    for i, name in enumerate(["../good/" + shard, "/etc/passwd", "sub/x.safetensors", "..", "x.bin", 7]):
        folder = broken(f"outside{i}")
        _index(folder, {**weight_map, "z": name})
        cases.append((folder, "names the shard"))
    folder = broken("duplicate")
    shutil.copy(folder / shard, folder / "more.safetensors")
    _index(folder, {**weight_map, **{n: "more.safetensors" for n, s in list(weight_map.items())[:1]}})
    cases.append((folder, "is stored twice"))
    folder = broken("lacking")
    _index(folder, {**weight_map, "z": shard})
    cases.append((folder, "lacks tensor z"))
    folder = broken("not-json")
    (folder / "model.safetensors.index.json").write_text("{")
    cases.append((folder, "cannot be read as JSON"))
    folder = broken("no-map")
    (folder / "model.safetensors.index.json").write_text("[]")
    cases.append((folder, "has no weight_map"))
    folder = broken("truncated")
    data = (folder / shard).read_bytes()
    (folder / shard).write_bytes(data[:-3])
    cases.append((folder, "truncated"))
    folder = broken("adapter")
    (folder / "adapter_config.json").write_text("{}")
    cases.append((folder, "merge it"))
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    cases.append((folder, r"only pickled weights \(pytorch_model.bin\).*save_pretrained"))
    empty = tmp_path / "empty"
    empty.mkdir()
    cases.append((empty, "is this a checkpoint folder"))
    named = tmp_path / "named"
    named.mkdir()
    save_file({"a": torch.zeros(1)}, named / "weights.safetensors")
    cases.append((named, "has weights.safetensors but neither"))
    for folder, says in cases:
        with pytest.raises(InputError, match=says) as caught:
            Checkpoint(folder)
        assert "\n" not in str(caught.value)


def _file(path: Path, header: bytes | object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "twice"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "not described"),
        ({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, "dtype 'F3'"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "not supported"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "does not fill"),
        ({"a": {"dtype": "F32", "shape": [1 << 61], "data_offsets": [0, 4]}}, "does not fill"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "0 was expected"),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            "4 was expected",
        ),
        ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "follow the last"),
        ({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, "truncated"),
        ({"__metadata__": {"x": 1}}, "metadata"),
        ({"__metadata__": 3}, "metadata"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header: object, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        TensorFile(_file(tmp_path / "x", header, b"\0" * 8))
    assert "\n" not in str(caught.value)


def test_lengths_that_lie_are_refused(tmp_path: Path) -> None:
    for data in (b"", b"1234567", struct.pack("<Q", 1 << 63), struct.pack("<Q", 50) + b"{}"):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(InputError):
            TensorFile(tmp_path / "x")
    with pytest.raises(InputError, match="is a folder"):
        TensorFile(tmp_path)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(data: st.DataObject) -> None:
    """Random damage to a small file: InputError, or exactly what safetensors itself would give."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    good = bytearray(_GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    good = good[: data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))))]
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"locus-fuzz-{os.getpid()}"
    path.write_bytes(good)
    try:
        file = TensorFile(path)
        ours = {name: file.read(name) for name in file.tensors}
    except InputError:
        return
    finally:
        path.unlink()
    try:
        theirs = load(bytes(good))
    except (SafetensorError, KeyError, ValueError):
        return  # stricter than we are (a header that does not start with a brace, say); nothing was misread
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.shape == ours[name].shape
        assert tensor.numpy().tobytes() == ours[name].numpy().tobytes()


def _good() -> bytes:
    from safetensors.torch import save

    return save({"a": torch.arange(3), "b": torch.ones(2, 2)}, metadata={"format": "pt"})


_GOOD = _good()


# ---- writing


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("link", [False, True])
def test_export_and_revert(tmp_path: Path, shards: int, link: bool) -> None:
    tensors = _tensors()
    base = _folder(tmp_path / "base", tensors, shards)
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "LICENSE", "modeling_x.py"):
        (base / name).write_text(name)
    for name in (
        "optimizer.pt",
        "pytorch_model.bin",
        "model.gguf",
        "other.safetensors",
        "trainer_state.json",
        ".x.json",
    ):
        (base / name).write_text(name)
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    was = _bytes(base)
    touched = "model.layers.1.mlp.up_proj.weight"
    delta = _delta(tensors, touched)
    delta.save(tmp_path / "delta.safetensors")
    delta = WeightDelta.load(tmp_path / "delta.safetensors")
    report = export(base, delta, tmp_path / "out", link=link)
    assert _bytes(base) == was, "the base is only read"
    out = _bytes(tmp_path / "out")
    owner = Checkpoint(base).file_of(touched)
    assert report.rewritten == (owner,)
    assert {name for name in was if name in out and out[name] != was[name]} == {owner}
    kept = {
        "tokenizer.json",
        "tokenizer.model",
        "generation_config.json",
        "LICENSE",
        "modeling_x.py",
        "config.json",
    }
    assert set(out) == kept | {*report.rewritten, *report.copied, "locus.json"} | (
        {"model.safetensors.index.json"} if shards > 1 else set()
    )
    assert {"original/params.json", "optimizer.pt", "model.gguf"} <= set(report.left_out)
    for name in report.copied:
        assert (os.stat(base / name).st_ino == os.stat(tmp_path / "out" / name).st_ino) == link
    n = 8 + struct.unpack("<Q", was[owner][:8])[0]
    assert out[owner][:n] == was[owner][:n], "header, metadata and order of tensors are kept"
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                want = tensors[name].clone()
                if name == touched:
                    want[1] += 1
                assert torch.equal(file.get_tensor(name), want)
    revert(tmp_path / "out", delta, tmp_path / "back", link=link)
    back = _bytes(tmp_path / "back")
    assert {name: data for name, data in back.items() if name != "locus.json"} == {
        n: was[n] for n in back if n in was
    }
    assert diff(base, tmp_path / "back").same
    assert not [p for p in tmp_path.iterdir() if p.name.endswith("locus-tmp")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "neox", "smollm", "phi3"])
def test_the_exported_folder_gives_the_edited_models_logits(
    arch: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(arch)
    model.module.to(dtype)
    save_tiny(model, tmp_path / "base", shards=2)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(model.atlas.n_layers, model.atlas.d_mlp, generator=generator) < 0.1
    mask = WeightMask.of_neurons(model.atlas, chosen)
    embed = f"{model.atlas.embed}.weight"
    mask |= WeightMask(
        {embed: Selection("rows", torch.tensor([3, 9]), tuple(module.get_parameter(embed).shape))}
    )
    entries = {}
    for name, selection in mask.entries.items():
        old = selection.take(module.get_parameter(name))
        entries[name] = (selection, old.float() + 0.3 * torch.randn(old.shape, generator=generator))
    delta = WeightDelta.of_entries(module, entries, mask)
    export(tmp_path / "base", delta, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    before = module(IDS).logits
    with delta.applied(module):
        assert torch.equal(loaded(IDS).logits, module(IDS).logits)
        assert fingerprint_of(loaded) == fingerprint_of(module) == Checkpoint(tmp_path / "out").fingerprint()
    assert not torch.equal(loaded(IDS).logits, before)
    report = diff(tmp_path / "base", tmp_path / "out", mask)
    assert (report.n_changed, report.n_off_mask) == (delta.n_changed, 0)
    revert(tmp_path / "out", delta, tmp_path / "back")
    assert diff(tmp_path / "base", tmp_path / "back").same
    assert Checkpoint(tmp_path / "back").fingerprint() == Checkpoint(tmp_path / "base").fingerprint()


def test_the_wrong_base_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    tensors, name = _tensors(), "model.layers.1.mlp.up_proj.weight"
    delta = _delta(tensors, name)
    other = {**tensors, name: tensors[name].clone()}
    other[name][0, 0] = 9.0
    edited = {**tensors, name: tensors[name].clone()}
    edited[name][1] += 1
    cases = [
        (_folder(tmp_path / "other", other), "does not hold the values this delta was made from"),
        (_folder(tmp_path / "edited", edited), "already holds the values that would be written"),
        (
            _folder(tmp_path / "wide", {n: t.float() for n, t in tensors.items()}),
            "in the delta: it was made for another model",
        ),
        (_folder(tmp_path / "lacking", {"x": torch.zeros(1)}), "holds no tensor"),
    ]
    for folder, says in cases:
        with pytest.raises(InputError, match=says):
            export(folder, delta, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="already holds the values that would be written"):
        revert(_folder(tmp_path / "base", tensors), delta, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"other", "edited", "wide", "lacking", "base"}


def test_out_must_be_new_beside_the_base_or_the_same_export(tmp_path: Path) -> None:
    tensors = _tensors()
    base, delta = _folder(tmp_path / "base", tensors, 2), _delta(tensors, "model.norm.weight")
    for out in (base, base / "inside", tmp_path):
        with pytest.raises(InputError, match="name a folder beside it"):
            export(base, delta, out)
    out = tmp_path / "out"
    export(base, delta, out)
    first = _bytes(out)
    with pytest.raises(InputError, match="there already and not empty"):
        export(base, delta, out)
    assert export(base, delta, out, resume=True).already_there
    assert _bytes(out) == first
    export(base, delta, tmp_path / "again")
    assert _bytes(tmp_path / "again") == first, "the same export gives the same bytes"
    with pytest.raises(InputError, match="is not this export"):
        export(base, _delta(tensors, "model.embed_tokens.weight"), out, resume=True)
    for name in ("config.json", *(n for n in first if n.endswith(".safetensors"))):
        data = bytearray(first[name])
        data[-1] ^= 1
        (out / name).write_bytes(data)
        with pytest.raises(InputError, match="is not this export"):
            export(base, delta, out, resume=True)
        (out / name).write_bytes(first[name])
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        export(base, delta, tmp_path / "file")


def test_an_empty_delta_copies(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", _tensors(), 2)
    report = export(base, WeightDelta({}, {}, {}), tmp_path / "out")
    assert report.rewritten == ()
    assert diff(base, tmp_path / "out").same


def test_copying_without_the_kernels_help_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = _tensors()
    base, delta = _folder(tmp_path / "base", tensors, 2), _delta(tensors, "model.norm.weight")
    export(base, delta, tmp_path / "fast")

    def refuse(*_: object, **__: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    export(base, delta, tmp_path / "slow")
    assert _bytes(tmp_path / "fast") == _bytes(tmp_path / "slow")


_STREAM = """
import os, resource, sys
from pathlib import Path
import torch
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
torch.set_num_threads(1)
from locus.checkpoint_export import export, revert, diff, Checkpoint
from locus.delta import WeightDelta
folder = Path(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (pages + int(sys.argv[2]),) * 2)
base = Checkpoint(folder / "base")
delta = WeightDelta.load(folder / "delta.safetensors")
assert base.n_bytes > 3 * int(sys.argv[2]), base.n_bytes
export(base, delta, folder / "out")
revert(folder / "out", delta, folder / "back")
report = diff(folder / "base", folder / "out")
assert report.n_changed == delta.n_changed, report
assert diff(folder / "base", folder / "back").same
assert Checkpoint(folder / "back").fingerprint() == base.fingerprint() == delta.base_fingerprint
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to know its own size")
def test_a_checkpoint_larger_than_memory_streams(tmp_path: Path) -> None:
    """384 MB in 3 files of 8 MB tensors; 112 MB more address space, stacks of threads included."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(48)]
    tensors = {name: torch.full((1024, 4096), float(i), dtype=torch.bfloat16) for i, name in enumerate(names)}
    base = _folder(tmp_path / "base", tensors, 3)
    touched = names[::2]
    delta = WeightDelta.between(Checkpoint(base), _delta_source(tensors, touched))
    delta.save(tmp_path / "delta.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
    limit = str(112 << 20)
    done = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tmp_path), limit], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for folder in ("out", "back", "base"):
        shutil.rmtree(tmp_path / folder)


def _delta_source(tensors: dict[str, Tensor], touched: list[str]) -> dict[str, Tensor]:
    edited = {}
    for name in touched:
        edited[name] = tensors[name].clone()
        edited[name][5] += 1
    return edited


_EXPORTER = """
import sys, itertools
from pathlib import Path
from locus.checkpoint_export import export
from locus.delta import WeightDelta
folder = Path(sys.argv[1])
delta = WeightDelta.load(folder / "delta.safetensors")
print("ready", flush=True)
for i in itertools.count(int(sys.argv[2])):
    export(folder / "base", delta, folder / f"out{i}")
"""


def test_a_kill_during_export_leaves_whole_folders_only_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    tensors = {name: torch.full((256, 1024), float(i)) for i, name in enumerate(names)}
    base = _folder(tmp_path / "base", tensors, 3)
    delta = _delta(tensors, *names[::2])
    delta.save(tmp_path / "delta.safetensors")
    export(base, delta, tmp_path / "want")
    want = _bytes(tmp_path / "want")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    generator, left = random.Random(1), set()
    for round_ in range(4):
        command = [sys.executable, "-c", _EXPORTER, str(tmp_path), str(1000 * round_)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as exporter:
            assert exporter.stdout is not None
            exporter.stdout.readline()
            time.sleep(generator.uniform(0.05, 0.4))
            exporter.kill()
        for out in tmp_path.glob("out*"):
            assert _bytes(out) == want
            shutil.rmtree(out)
        left = {path.name.split(".")[1] for path in tmp_path.glob(".out*.locus-tmp")}
        for name in left:
            export(base, delta, tmp_path / name)
            assert _bytes(tmp_path / name) == want
            shutil.rmtree(tmp_path / name)
        assert {path.name for path in tmp_path.iterdir()} == {"base", "want", "delta.safetensors"}
        if left:
            break
    assert left, "no kill fell into an export: the test has shown nothing"


# ---- comparing


def test_diff_counts_bits_on_and_off_the_mask(tmp_path: Path) -> None:
    """By hand: a 4x4 of 2.0 has norm 8; two entries move by 1 and by 3: norm sqrt(10), largest 3."""
    a = {"w": torch.full((4, 4), 2.0), "v": torch.zeros(3), "n": torch.tensor([float("nan")])}
    b = {"w": a["w"].clone(), "v": torch.tensor([0.0, -0.0, float("inf")]), "n": a["n"]}
    b["w"][1, 1], b["w"][2, 3] = 3.0, 5.0
    mask = WeightMask({"w": Selection("rows", torch.tensor([1]), (4, 4))})
    report = diff(_folder(tmp_path / "a", a), _folder(tmp_path / "b", b, shards=2), mask)
    w = next(tensor for tensor in report.tensors if tensor.name == "w")
    v = next(tensor for tensor in report.tensors if tensor.name == "v")
    assert (w.n_entries, w.n_changed, w.max_abs, w.n_on_mask, w.n_off_mask) == (16, 2, 3.0, 1, 1)
    assert w.relative_norm == pytest.approx(10**0.5 / 8)
    assert (v.n_changed, v.n_nonfinite, v.max_abs, v.n_off_mask) == (2, 1, 0.0, 2)
    assert [t.name for t in report.tensors] == ["v", "w"], "NaN equals itself"
    assert (report.n_changed, report.n_on_mask, report.n_off_mask) == (4, 1, 3)
    assert report.summary == "4 of 20 weights differ, in 2 of 3 tensors; 1 on the mask, 3 off it"
    json.dumps(report.to_json(), allow_nan=False)
    assert diff(tmp_path / "a", tmp_path / "b").n_on_mask is None


def test_diff_equals_a_delta_between_on_random_edits(tmp_path: Path) -> None:
    """Pieces smaller than a tensor must not matter: 3 MB of elements with an 8 MB piece, and odd shapes."""
    generator = torch.Generator().manual_seed(0)
    a = {
        "big": torch.randn(3000, 1001, generator=generator),
        "odd": torch.randn(7, 5, 3, generator=generator),
    }
    where = {name: torch.rand(t.shape, generator=generator) < 0.01 for name, t in a.items()}
    b = {name: torch.where(where[name], t + 1, t) for name, t in a.items()}
    mask = WeightMask.of_elements(
        {name: torch.rand(t.shape, generator=generator) < 0.3 for name, t in a.items()}
    )
    report = diff(_folder(tmp_path / "a", a), _folder(tmp_path / "b", b), mask)
    for tensor in report.tensors:
        on = int((where[tensor.name] & mask.entries[tensor.name].dense()).sum())
        assert (tensor.n_on_mask, tensor.n_changed) == (on, int(where[tensor.name].sum()))
        want = (b[tensor.name] - a[tensor.name]).norm() / a[tensor.name].norm()
        assert tensor.relative_norm == pytest.approx(float(want), rel=1e-4)
    assert report.n_off_mask == WeightDelta.between(a, b).outside(mask)


def test_diff_matches_names_and_tells_what_is_missing(tmp_path: Path) -> None:
    a = {"h.0.w": torch.zeros(2), "x": torch.zeros(1), "s": torch.zeros(2)}
    b = {"transformer.h.0.w": torch.ones(2), "y": torch.zeros(1), "s": torch.zeros(3)}
    report = diff(_folder(tmp_path / "a", a), _folder(tmp_path / "b", b))
    assert [t.name for t in report.tensors] == ["h.0.w"]
    assert (report.only_in_a, report.only_in_b, report.reshaped) == (("x",), ("y",), ("s",))
    assert not report.same
    with pytest.raises(InputError, match="mask: made for another model"):
        diff(tmp_path / "a", tmp_path / "b", WeightMask({"x": Selection("all", None, (9,))}))
