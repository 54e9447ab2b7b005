"""One seed for everything random: another `--seed` gives another edit, or the editor declares itself deterministic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from editors import EDITORS, OBJECTIVES
from locus.cli import execute
from locus.cli.methods import is_deterministic
from locus.cli.options import method_settings
from locus.delta import WeightDelta
from locus.model import Model
from tests.editors.direct_edits import TEXT, down, facts
from tests.tiny import tiny_model

TWO_STAGES = ("whp", "task-vector")
QUICK = ("--target-steps", "2", "--target-kl", "0", "--target-prefixes", "1", "--target-prob-stop", "0")
DIRECT: dict[str, tuple[str, ...]] = {
    "rome": ("--layer", "1", *QUICK),
    "memit": (*QUICK, "--layers", "0", "1"),
    "alphaedit": (*QUICK, "--layers", "0", "1"),
    "law": (*QUICK, "--layers", "0", "1", "--rounds", "1"),
    "late-suppression": (
        "--elicitation-rewritings", "0", "--elicitation-lists", "0", "--elicitation-texts", "2",
        "--elicitation-text-tokens", "8", "--goal", "1e-4", "--weight", "0.01", "--rounds", "1", "--look-ahead", "0",
        "--hold-tokens", "6",
    ),
    "neuron-zero": (),
    "neuron-flip": (),
    "neuron-mean": (),
    "neuron-direction": ("--towards", "noise"),
    "neuron-selective": ("--where", "prompt"),
    "neuron-descent": ("--where", "prompt", "--slack", "0.1", "--prob-stop", "1e-6"),
    "knowledge-neurons": (),
    "depn": (),
    "projection": ("--protect", "1"),
}  # fmt: skip
"""Options, as on the command line, with which a draw matters."""


def edited(model: Model, name: str, seed: int) -> WeightDelta:
    """The edit of a command line with `--seed`."""
    editor: Any = method_settings(name, EDITORS[name], DIRECT[name], {"seed": seed})
    delta: WeightDelta = editor.run(model, facts()[:1], facts()[1:], down(model), text=TEXT)
    return delta


def same(one: WeightDelta, other: WeightDelta) -> bool:
    return one.changes.keys() == other.changes.keys() and all(
        torch.equal(change.new, other.changes[name].new) for name, change in one.changes.items()
    )


@pytest.mark.parametrize("name", DIRECT)
def test_another_seed_is_another_edit_or_the_editor_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))
    model = tiny_model()
    first = edited(model, name, 0)
    assert same(first, edited(model, name, 0))
    assert same(first, edited(model, name, 1)) == is_deterministic(EDITORS[name])


def test_every_direct_edit_is_asked() -> None:
    assert set(DIRECT) == EDITORS.keys() - OBJECTIVES.keys() - set(TWO_STAGES)


def test_the_page_of_a_method_says_whether_a_seed_matters(capsys: Any) -> None:
    for name, says in (("neuron-zero", True), ("rome", False)):
        assert execute(["methods", name]) == 0
        assert ("Deterministic: nothing is drawn at random" in capsys.readouterr().out) == says
        assert execute(["methods", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out).get("deterministic", False) == says
