"""`locus ask`: the answers before and after an edit, from arguments, from a file of prompts, from a person."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from locus.audit.attacks.generation import generate
from locus.cli import execute
from locus.delta import WeightDelta
from locus.model import load_model
from tests.tiny import save_tiny, tiny_model

PROMPTS = ("The Eiffel Tower is in the city of", "Rome is")


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("ask")
    base, edited = tiny_model("llama"), tiny_model("llama", seed=1)
    save_tiny(base, place / "base")
    save_tiny(edited, place / "edited")
    loaded = load_model(place / "base")
    WeightDelta.between(loaded.module, edited.module).save(place / "edit" / "delta.safetensors")
    return place


def written(folder: Path, n: int) -> list[str]:
    """Greedy continuations, straight from the model."""
    model = load_model(folder)
    return generate(model, [model.tokenizer(prompt).input_ids for prompt in PROMPTS], n)


@pytest.mark.parametrize("edited", ["edit", "edit/delta.safetensors", "edited"])
def test_base_and_edit_side_by_side(place, edited, capsys):
    argv = ["ask", str(place / "base"), *PROMPTS, "--edited", str(place / edited), "--tokens", "4", "--json"]
    assert execute(argv) == 0
    rows = json.loads(capsys.readouterr().out)["answers"]
    base, after = written(place / "base", 4), written(place / "edited", 4)
    assert base != after
    assert rows == [
        {"prompt": p, "base": b, "edited": e} for p, b, e in zip(PROMPTS, base, after, strict=True)
    ]


def test_prompts_one_a_line_from_stdin_and_the_base_alone(place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([PROMPTS[0], "", PROMPTS[1]])))
    assert execute(["ask", str(place / "base"), "--tokens", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["answers"]
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert [row["base"] for row in rows] == written(place / "base", 4) and "edited" not in rows[0]


def test_a_person_is_answered_at_once_until_an_empty_line(place, monkeypatch, capsys):
    typed = iter([PROMPTS[0], "", "never read"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert execute(["ask", str(place / "base"), "--edited", str(place / "edit"), "--tokens", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["The", "base", "edited"]
    assert list(typed) == ["never read"]


def test_what_cannot_be_asked_is_refused(place, capsys):
    base = str(place / "base")
    for argv, words in (
        (["ask", base, " "], "prompt 1 is empty"),
        (["ask", base, "Rome", "--tokens", "0"], "--tokens 0: give 1 or more"),
        (["ask", base, "Rome", "--edited", str(place / "nothing")], "nothing"),
    ):
        assert execute(argv) == 2
        assert words in capsys.readouterr().err
