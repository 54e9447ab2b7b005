"""`locus run`: a stage offers what its command offers, and says what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from locus.cli import execute
from locus.cli.options import Loading, Running, Talking
from locus.cli.run import STAGES, Walk, _method_options, _own_options
from tests.tiny import save_tiny, tiny_model

HEAD = '[model]\nname = "{place}/model"\n[facts]\nforget = "{place}/facts.jsonl"\n'
DIRECT = """
[edit]
layers = [0]
target_steps = 1
target_prefixes = 0
target_kl = 0
target_prob_stop = 0
controls = 1
control_profile = "uniform"
"""
AUDIT = '[audit]\nattacks = ["none"]\ngate = "{place}/gate.toml"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("run")
    save_tiny(tiny_model("llama"), place / "model")
    fact = {
        "id": "eiffel",
        "prompt": "The Eiffel Tower is in the city of",
        "target": " Paris",
        "subject": "Eiffel Tower",
        "alternatives": [" Rome", " Berlin"],
    }
    (place / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    (place / "gate.toml").write_text('[figures."forget.prob"]\nmax = -1.0\n')
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path / "cache"))


def _config(place: Path, tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text((HEAD + text).format(place=place))
    return path


def test_the_default_edit_needs_no_locate_stage_and_a_gate_ends_in_3(place, tmp_path):
    config, out = _config(place, tmp_path, DIRECT + AUDIT), tmp_path / "out"
    assert execute(["run", str(config), "-o", str(out), "-q"]) == 3
    about = json.loads((out / "edit" / "edit.json").read_text())
    assert about["method"] == "alphaedit"
    assert list((out / "edit").glob("control-*/delta.safetensors")), about.get("no_controls")
    audit = json.loads((out / "audit" / "audit.json").read_text())
    edited = next(state for state in audit["states"] if state["role"] == "edit")
    assert edited["change"]["off_mask"] == 0, "the edit's own mask is what it is held to"
    assert execute(["run", str(config), "-o", str(out), "-q", "--resume"]) == 3, "the gate is still not met"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[lokate]\n", ('unknown table "lokate"', '"locate"')),
        ("[locate]\nbugdet = 3\n", ('[locate]: unknown option "bugdet"', '"budget"')),
        ("[edit]\nmethod = 'npo'\nlearning_rat = 3\nlrr = 1\n", ('unknown option "learning_rat"',)),
        ("[edit]\nmethod = 'npo'\nmin_step = 3\n", ('"min_steps"',)),
        ("[edit]\nmethod = 'npp'\n", ("did you mean npo",)),
        ("[edit]\n[audit]\nattacks = ['lense']\n", ("did you mean lens",)),
        ("[edit]\n[audit]\nrounding = ['int3']\n", ("[audit]", "int3")),
        ("[edit]\nout = 'x'\n", ('unknown option "out"',)),
        ("[run]\nsed = 1\n", ('[run]: unknown option "sed"', '"seed"')),
        ("[locate]\nmethod = 'saliency,random'\n", ("[locate]: one method",)),
        ("[audit]\n", ("[audit] needs [edit]",)),
    ],
)
def test_what_a_stage_does_not_know_is_refused_with_the_nearest(text, words, place, tmp_path, capsys):
    out = tmp_path / "out"
    assert execute(["run", str(_config(place, tmp_path, text)), "-o", str(out)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") == 1, said
    assert not out.exists()


def test_chat_and_remote_code_are_options_of_the_model(place, tmp_path):
    text = "\n[run]\nseed = 7\nlimit = 1\n[trace]\nsamples = 1\nlimit = 2\n[locate]\n"
    config = _config(place, tmp_path, text)
    config.write_text(config.read_text().replace("[facts]", "chat = true\ntrust_remote_code = true\n[facts]"))
    stages = Walk.read(config, tmp_path / "out", Talking(quiet=True)).stages
    for name, limit in (("trace", 2), ("locate", 1)):
        given = stages[name].bound.arguments
        assert given["loading"] == Loading(chat=True, trust_remote_code=True)
        assert given["running"] == Running(seed=7, limit=limit, resume=name == "trace")


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_of_the_command_and_of_its_method_is_known(stage, place, tmp_path):
    """None is refused as unknown; a value may still be refused as no value of that option."""
    needs = {"edit": "[locate]\n", "export": "[edit]\n", "audit": "[edit]\n"}.get(stage, "")
    method = {"locate": "saliency", "edit": "npo"}.get(stage, "")
    options = [*_own_options(stage), *_method_options(stage, method)]
    assert {"trace": "samples", "locate": "threshold", "edit": "widen", "export": "link", "audit": "tasks"}[
        stage
    ] in options
    for name in options:
        config = _config(place, tmp_path, f"{needs}[{stage}]\n{name} = '1'\n")
        try:
            Walk.read(config, tmp_path / "out", Talking(quiet=True))
        except Exception as error:  # any refusal of the value
            assert "unknown option" not in str(error).casefold(), (name, error)
