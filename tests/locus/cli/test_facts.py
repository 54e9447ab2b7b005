"""`locus facts`: what it says of a file, and that what it writes is read back as the same facts."""

from __future__ import annotations

import json

from locus.cli import execute
from locus.fact import read_facts
from tests.tiny import save_tiny, tiny_model

ROW = {
    "case_id": 2, "prompt": "The capital of France is", "target_new": "Rome", "subject": "France",
    "ground_truth": "Paris", "rephrase_prompt": "France's capital is", "locality_prompt": "The capital of Spain is",
    "locality_ground_truth": "Madrid",
}  # fmt: skip


def _file(tmp_path, *rows):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(list(rows)))
    return path


def test_a_file_is_explained_and_converted(tmp_path, capsys):
    path, out = _file(tmp_path, ROW), tmp_path / "out.jsonl"
    assert execute(["facts", str(path), "--write", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["format"] == "easyedit" and said["left_out"] == ["case_id"]
    assert said["fields_used"] == [name for name in ROW if name != "case_id"]
    assert (said["facts"], said["subjects"], said["paraphrases"], said["neighbours"]) == (1, 1, 1, 1)
    assert said["first"][0]["target"] == " Paris" and said["first"][0]["subject_span"] == [15, 21]
    (before,), (after,) = read_facts(path), read_facts(out)
    assert {**vars(before), "source": ""} == {**vars(after), "source": ""}
    assert execute(["facts", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("easyedit", "' Paris'", "France", "left out: case_id", "facts 1, subjects 1"):
        assert text in shown


def test_tokens_are_counted_without_weights(tmp_path, capsys):
    folder = save_tiny(tiny_model("llama"), tmp_path / "m")
    (folder / "model.safetensors").unlink()
    path = _file(
        tmp_path,
        {"prompt": "Germany is", "target": " Berlin"},
        {"prompt": "It is the", "target": " city of Rome"},
    )
    assert execute(["facts", str(path), "--model", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["most target tokens"] >= 3 and said["most prompt tokens"] >= 3


def test_an_explicit_format_drops_what_it_does_not_use_and_says_so(tmp_path, capsys):
    path = _file(tmp_path, {"question": "Which?", "answer": "Ann", "context": "A text."})
    assert execute(["facts", str(path)]) == 2
    assert '"context"' in capsys.readouterr().err
    assert execute(["facts", str(path), "--format", "tofu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == ["context"]
    assert execute(["facts", str(path), "--format", "tofuu"]) == 2
    assert 'did you mean "tofu"' in capsys.readouterr().err


def test_markup_in_a_file_is_shown_as_it_is(tmp_path, capsys):
    path = _file(tmp_path, {"prompt": "[red]The city[/red] is", "target": " [bold]Paris"})
    assert execute(["facts", str(path)]) == 0
    assert "[bold]Paris" in capsys.readouterr().out
