"""Bad input at the command line: one clear line, exit 2, nothing half-written."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from locus.cli import execute
from tests.tiny import save_tiny, tiny_model

FACT = {"id": "a", "prompt": "The Eiffel Tower is in", "target": " Paris", "subject": "Eiffel Tower"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(tiny_model("llama"), path)
    return path


@pytest.fixture
def facts(tmp_path):
    return _write(tmp_path / "facts.jsonl", FACT)


def _write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def _refused(capsys, argv, *words):
    """Run a command that must fail with one line on stderr that has all the words."""
    code = execute([str(a) for a in argv])
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("locus: ")]
    assert code == 2, captured.err
    assert len(said) == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    for word in words:
        assert word in said[0]
    return said[0]


COMMANDS = {
    "trace": lambda model, facts, out: ["trace", model, facts, "-o", out, "--samples", "1", "-q"],
    "locate": lambda model, facts, out: ["locate", model, facts, "-o", out, "-q"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_fact_file(command, folder, tmp_path, capsys):
    out = tmp_path / "out"
    _refused(capsys, COMMANDS[command](folder, tmp_path / "fatcs.jsonl", out), "fatcs.jsonl")
    assert not out.exists()


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ((FACT, {**FACT, "id": "b"}, "{not json"), ("line 3",)),
        (({**FACT, "subject": "eiffel tower"},), ("line 1", "eiffel tower")),
        ((), ("facts.jsonl", "empty")),
        (({**FACT, "prompt": "word " * 4000, "subject": None},), ("context",)),
        ((FACT, FACT), ("line 2", "taken")),
        (({"id": "a", "prompt": "x"},), ("line 1", "target")),
    ],
    ids=["line 3 is not JSON", "subject elsewhere", "empty", "too long", "twice", "no target"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_malformed_fact_file(command, records, words, folder, tmp_path, capsys):
    out = tmp_path / "out"
    path = _write(tmp_path / "facts.jsonl", *records)
    _refused(capsys, COMMANDS[command](folder, path, out), *words)
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".safetensors"]


def test_unknown_methods_and_options(folder, facts, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    locate = ["locate", folder, facts, "-o", out]
    _refused(capsys, [*locate, "--method", "salience"], "salience", "saliency")
    _refused(capsys, [*locate, "--no-such-option", "1"], "--no-such-option")
    _refused(capsys, [*locate, "--budget", "0"], "budget")
    _refused(capsys, [*locate, "--limit", "0"], "--limit")
    _refused(capsys, ["traec", "x"], "traec")
    assert not out.exists()


def test_nan_in_the_weights(facts, tmp_path, capsys):
    folder = tmp_path / "nan"
    save_tiny(tiny_model("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _refused(
        capsys, COMMANDS["trace"](folder, facts, tmp_path / "out"), "layers.0.mlp.down_proj.weight", "NaN"
    )


def test_a_mask_or_delta_of_another_model(folder, facts, tmp_path, capsys):
    other, mask, out = tmp_path / "other", tmp_path / "m.safetensors", tmp_path / "edit"
    save_tiny(tiny_model("llama", seed=1), other)
    assert execute(["locate", str(other), str(facts), "-o", str(mask), "-q"]) == 0
    steps = ["--steps", "1", "--min-steps", "1", "--utility", "0", "--max-kl", "0", "-q"]
    _refused(capsys, ["edit", folder, facts, "--mask", mask, "-o", out, *steps], "mask", "fingerprint")
    assert not (out / "delta.safetensors").exists()
    assert execute(["edit", str(other), str(facts), "--mask", str(mask), "-o", str(out), *steps]) == 0
    checkpoint = tmp_path / "checkpoint"
    delta = out / "delta.safetensors"
    capsys.readouterr()
    _refused(capsys, ["export", folder, "--delta", delta, "-o", checkpoint], "made from")
    assert not checkpoint.exists()
    _refused(capsys, ["export", other, "--delta", mask, "-o", checkpoint], "mask")
    delta.write_bytes(delta.read_bytes()[:-10])
    _refused(capsys, ["export", other, "--delta", delta, "-o", checkpoint], "delta.safetensors")
    assert not checkpoint.exists()


def test_an_output_that_cannot_be_written(folder, facts, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    _refused(capsys, COMMANDS["trace"](folder, facts, blocked), "file")
    _refused(capsys, COMMANDS["locate"](folder, facts, blocked / "mask.safetensors"), "file")
    assert blocked.read_text() == "in the way"


def test_a_finished_folder_is_not_overwritten(folder, facts, tmp_path, capsys):
    command = [str(a) for a in COMMANDS["trace"](folder, facts, tmp_path / "out")]
    assert execute(command) == 0
    before = (tmp_path / "out" / "trace.safetensors").read_bytes()
    _refused(capsys, command, "--resume")
    assert (tmp_path / "out" / "trace.safetensors").read_bytes() == before


def test_json_is_one_object_on_stdout(folder, facts, tmp_path, capsys):
    assert (
        execute([str(a) for a in ["locate", folder, facts, "-o", tmp_path / "m.safetensors", "--json"]]) == 0
    )
    out = capsys.readouterr().out
    assert json.loads(out)["neurons"] >= 1
    assert out.count("\n") == 1


def test_a_fault_is_one_line_and_exit_1(folder, facts, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("boom\nmore")

    monkeypatch.setattr("locus.model.load_model", broken)
    assert execute([str(a) for a in COMMANDS["locate"](folder, facts, tmp_path / "m.safetensors")]) == 1
    err = capsys.readouterr().err
    assert err.strip() == "locus: RuntimeError: boom (a fault of locus; --debug shows where)"
    with pytest.raises(RuntimeError):
        execute([str(a) for a in [*COMMANDS["locate"](folder, facts, tmp_path / "m.safetensors"), "--debug"]])


def test_ctrl_c_says_how_to_go_on(folder, facts, tmp_path, capsys, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("locus.model.load_model", stopped)
    assert execute([str(a) for a in COMMANDS["trace"](folder, facts, tmp_path / "out")]) == 1
    assert "--resume" in capsys.readouterr().err


def test_help_is_quick_and_heavy_libraries_stay_out():
    import subprocess
    import sys

    code = (
        "import sys; from locus.cli import execute; execute(['--help']); "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trace" in done.stdout
    assert done.stdout.strip().endswith("[]")
