"""The whole walk on a tiny model: every stage's artefact, resumed, changed, reverted to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import locus
from locus.cli import execute
from locus.delta import WeightDelta
from tests.tiny import save_tiny, tiny_model

WORDS = ("Eiffel", "Gothic", "Marble", "Silver", "Wooden", "Copper", "Golden", "Broken")

CONFIG = """
[model]
name = "{place}/model"
[facts]
forget = "{place}/forget.jsonl"
retain = "{place}/retain.jsonl"
text = "{place}/text.txt"
[trace]
limit = 1
samples = 2
[locate]
budget = "{budget}"
[edit]
method = "npo"
steps = 2
min_steps = 1
retain_facts = 2
controls = 1
[export]
[audit]
rounding = ["bfloat16"]
"""


def _facts(words, held_out):
    for i, word in enumerate(words):
        yield {
            "id": word.lower(),
            "prompt": f"The {word} Tower is in the city of",
            "target": " Paris",
            "subject": f"{word} Tower",
            "relation": "city",
            "paraphrases": [f"Where is the {word} Tower? It stands in"],
            "neighbours": [{"prompt": "The Colosseum is in the city of", "target": " Rome"}],
            "held_out": held_out and i % 2 == 0,
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("walk")
    save_tiny(tiny_model("llama"), place / "model", shards=2)
    for name, words, held_out in (("forget", WORDS[:3], False), ("retain", WORDS[3:], True)):
        lines = (json.dumps(fact) + "\n" for fact in _facts(words, held_out))
        (place / f"{name}.jsonl").write_text("".join(lines))
    (place / "text.txt").write_text(
        "The cat sat on the mat and looked at the rain.\n\nA dog barked.\n\nRain fell on the gate.\n"
    )
    (place / "walk.toml").write_text(CONFIG.format(place=place, budget="10%"))
    assert execute(["run", str(place / "walk.toml"), "-o", str(place / "out"), "-q"]) == 0
    return place


def test_every_stage_leaves_its_artefact(place):
    out = place / "out"
    for path in (
        "trace/trace.safetensors",
        "trace/average.json",
        "trace/report.html",
        "trace/eiffel.png",
        "mask.safetensors",
        "edit/delta.safetensors",
        "edit/history.jsonl",
        "edit/control-0/delta.safetensors",
        "checkpoint/config.json",
        "audit/audit.json",
        "audit/report.html",
    ):
        assert (out / path).is_file(), path


def test_the_exported_folder_gives_the_edited_models_logits(place):
    model = locus.load_model(place / "model")
    delta = WeightDelta.load(place / "out" / "edit" / "delta.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(place / "out" / "checkpoint")
    ids = torch.tensor([[1, 7, 3, 9]])
    base = model.module(ids).logits
    with delta.applied(model):
        edited = model.module(ids).logits
    assert torch.equal(plain(ids).logits, edited)
    assert not torch.equal(edited, base)
    assert torch.equal(model.module(ids).logits, base)


def test_revert_gives_the_base_bit_for_bit_and_diff_stays_on_the_mask(place, capsys):
    out = place / "out"
    delta = out / "edit" / "delta.safetensors"
    assert (
        execute(["revert", str(out / "checkpoint"), "--delta", str(delta), "-o", str(place / "back"), "-q"])
        == 0
    )
    for shard in sorted((place / "model").glob("*.safetensors")):
        assert (place / "back" / shard.name).read_bytes() == shard.read_bytes()
    capsys.readouterr()
    mask = str(out / "mask.safetensors")
    assert execute(["diff", str(place / "model"), str(out / "checkpoint"), "--mask", mask, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(row["n_off_mask"] for row in report["tensors"]) == 0
    assert sum(row["n_changed"] for row in report["tensors"]) > 0


def test_resume_takes_finished_stages_and_remakes_what_depends_on_a_change(place, capsys):
    out = place / "out"
    command = ["run", str(place / "walk.toml"), "-o", str(out), "--resume"]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert execute(command) == 0
    assert capsys.readouterr().err.count("done before") == 5
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps
    (place / "other.toml").write_text(CONFIG.format(place=place, budget="20%"))
    assert execute(["run", str(place / "other.toml"), "-o", str(out), "--resume"]) == 0
    assert capsys.readouterr().err.count("done before") == 1
    assert (out / "trace" / "trace.safetensors").stat().st_mtime_ns == stamps[
        out / "trace" / "trace.safetensors"
    ]
    assert (out / "mask.safetensors").stat().st_mtime_ns != stamps[out / "mask.safetensors"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nname = 3 4", ("TOML",)),
        ("[modle]\n", ("modle",)),
        ("[model]\nname='x'\n", ("[facts]",)),
        ("[model]\nname='x'\n[facts]\nforget='f'\n[export]\n", ("[edit]",)),
        ("[model]\nname='x'\n[facts]\nforget='f'\n[locate]\nmethod='nope'\n", ("nope",)),
        (
            "[model]\nname='x'\n[facts]\nforget='f'\n[locate]\n[edit]\nlearning_rate=1\n",
            ("[edit]", "learning_rate"),
        ),
        ("[model]\nname='x'\nlr=3\n[facts]\nforget='f'\n", ("lr",)),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_written(text, words, tmp_path, capsys):
    config = tmp_path / "walk.toml"
    config.write_text(text)
    assert execute(["run", str(config), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("locus: ") and said.count("\n") == 1
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists()


def test_a_missing_configuration(tmp_path, capsys):
    assert execute(["run", str(tmp_path / "absent.toml"), "-o", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
