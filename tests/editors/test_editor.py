"""Capabilities are Protocols: every editor is one, and nothing asks an object for an attribute by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import editors
from editors import EDITORS, OBJECTIVES
from editors.editor import ChoosesMask, EditData, Editor, Rewrites
from editors.memory_estimate import trained_objective
from editors.training.objective import Objective, Trains, TrainsInStages
from locus.errors import InputError
from tests.tiny import tiny_facts


@pytest.mark.parametrize("name", EDITORS)
def test_every_entry_of_the_table_is_an_editor_of_one_kind(name: str) -> None:
    """Objectives train; the two-stage methods train in stages; the rest trains nothing and has no memory estimate."""
    editor = EDITORS[name]()
    assert isinstance(editor, Editor)
    assert isinstance(editor, Objective) == (name in OBJECTIVES)
    if isinstance(editor, Trains):
        assert isinstance(editor, Objective) != isinstance(editor, TrainsInStages)
        assert isinstance(trained_objective(editor), Objective)
    else:
        with pytest.raises(InputError, match="trains nothing"):
            trained_objective(editor)


def test_who_chooses_a_mask_and_who_rewrites() -> None:
    made = {name: editor() for name, editor in EDITORS.items()}
    assert {name for name, editor in made.items() if isinstance(editor, Rewrites)} == {
        "rome", "memit", "alphaedit", "law",
    }  # fmt: skip
    own = {name for name, editor in made.items() if isinstance(editor, ChoosesMask)}
    assert own.isdisjoint(OBJECTIVES) and {"rome", "alphaedit", "neuron-zero"} <= own


def test_a_rewrite_is_the_same_edit_with_another_answer() -> None:
    before = editors.ROME(ridge=0.5)
    after = before.rewriting_to(" Rome")
    assert (after.target.to, after.target.answer, after.ridge) == ("rewrite", " Rome", 0.5)


def test_edit_data_knows_what_may_be_trained_on() -> None:
    facts = tiny_facts()
    data = EditData(facts, facts, ["text"])
    assert any(fact.held_out for fact in facts)
    assert data.trainable_retain == [fact for fact in facts if not fact.held_out]


def test_no_capability_is_asked_for_by_name() -> None:
    """hasattr, and getattr with a default, in editors/ and the command line."""
    root = Path(editors.__file__).parents[1]
    asked = re.compile(r"hasattr\(|getattr\([^()]*,[^()]*,[^()]*\)")
    found = {
        str(path.relative_to(root))
        for folder in ("editors", "locus/cli")
        for path in (root / folder).rglob("*.py")
        if asked.search(path.read_text("utf-8"))
    }
    assert found <= {"editors/key_value/prefix.py"}  # a cache of transformers, whose layers differ by version
