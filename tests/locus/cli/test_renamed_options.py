"""Option names of the release before are read, and say what they are called now."""

from __future__ import annotations

from typing import Any

import pytest

from locus.cli import execute
from locus.cli.options import settings_from
from locus.cli.renamed_options import RENAMED, current_options


def test_an_old_name_is_replaced_with_one_note_and_values_are_left_alone() -> None:
    with pytest.warns(UserWarning, match=r"--account is now called --estimate-memory") as noted:
        current = current_options(
            ["edit", "m", "--account", "--text=--account", "--account=1", "--", "--account"]
        )
    assert current == [
        "edit",
        "m",
        "--estimate-memory",
        "--text=--account",
        "--estimate-memory=1",
        "--",
        "--account",
    ]
    assert len(noted) == 1


def test_the_command_line_reads_the_old_name(capsys: Any) -> None:
    """Both names end in the same refusal; only the old one has a note."""
    said = {}
    for name in ("--account", "--estimate-memory"):
        assert execute(["edit", "smollm2", "demo-forget", name]) == 2
        said[name] = capsys.readouterr().err
    assert "locus: note: --account is now called --estimate-memory" in said["--account"]
    assert said["--account"].splitlines()[1:] == said["--estimate-memory"].splitlines()
    assert "--estimate-memory needs --mask" in said["--estimate-memory"]


def test_tables_of_a_run_read_old_names(monkeypatch: Any) -> None:
    from editors import NPO

    monkeypatch.setitem(RENAMED, "--inverse-temperature", "--beta")
    with pytest.warns(UserWarning, match="--beta"):
        assert settings_from("[edit]", NPO, {"inverse_temperature": 0.5}) == NPO(beta=0.5)
