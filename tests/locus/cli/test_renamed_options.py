"""Option names of the release before are read, and say what they are called now."""

from __future__ import annotations

from typing import Any

import pytest

from locus.cli import execute
from locus.cli.options import settings_from
from locus.cli.renamed_options import RENAMED_OPTIONS, current_options


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

    monkeypatch.setitem(RENAMED_OPTIONS, "--inverse-temperature", "--beta")
    with pytest.warns(UserWarning, match="--beta"):
        assert settings_from("[edit]", NPO, {"inverse_temperature": 0.5}) == NPO(beta=0.5)


def test_every_old_name_leads_to_an_option_that_exists() -> None:
    """A misspelt new name would turn a working command line into an error."""
    from editors import EDITORS
    from locus.audit import AuditSettings
    from locus.cli.app import app
    from locus.cli.options import method_app

    known = _flags(app["edit"])
    for cls in (*EDITORS.values(), AuditSettings):
        known |= _flags(method_app("m", cls))
    assert set(RENAMED_OPTIONS.values()) <= known


def _flags(command: Any) -> set[str]:
    return {name for argument in command.assemble_argument_collection() for name in argument.names}


def test_a_method_reads_its_old_options() -> None:
    from editors import LaW, NeuronDescent

    old = {"aim_gone": 0.5, "aim_enough": 0.25, "aim_to": "entropy", "washed": 0.125}
    with pytest.warns(UserWarning, match="--target-prob-stop"):
        law = settings_from("[edit]", LaW, old)
    assert (law.target.prob_stop, law.target.loss_stop, law.target.to) == (0.5, 0.25, "entropy")
    assert law.forgotten == 0.125
    with pytest.warns(UserWarning, match="--strength-goal"):
        descent = settings_from(
            "[edit]", NeuronDescent, {"enough": 0.5, "dose_goal": 0.25, "dose_curve": [1.0]}
        )
    assert (descent.prob_stop, descent.strength_goal, descent.strength_curve) == (0.5, 0.25, (1.0,))


def test_an_old_value_is_replaced_behind_its_option_only() -> None:
    with pytest.warns(UserWarning, match="--sites block_out is now called resid_post") as noted:
        assert current_options(["lens", "block_out", "--sites", "block_out", "attn_out", "--top", "3"]) == [
            *["lens", "block_out", "--sites", "resid_post", "attn_out", "--top", "3"],
        ]
    assert len(noted) == 1
    with pytest.warns(UserWarning, match="block_mid is now called resid_mid"):
        assert current_options(["--sites=block_mid"]) == ["--sites=resid_mid"]
