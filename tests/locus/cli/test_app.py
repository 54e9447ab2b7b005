"""The help of every command: it says what the command does, names what it takes, and shows nothing of the parser."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from locus.cli import execute
from locus.cli.app import _COMMANDS, app

COMMANDS = tuple(_COMMANDS)


def _help(capsys: Any, *argv: str) -> str:
    assert execute([*argv, "--help"]) == 0
    said: str = capsys.readouterr().out
    return said


def _words(text: str) -> str:
    """The text without the panels' frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).replace("`", "").split())


def _function(command: str) -> Callable[..., Any]:
    function = app[command].default_command
    assert function is not None
    return function


@pytest.mark.parametrize("command", COMMANDS)
def test_it_says_what_the_docstring_says_and_nothing_of_the_parser(command, capsys):
    said = _help(capsys, command)
    about = inspect.cleandoc(_function(command).__doc__ or "").split("\nArgs:")[0]
    assert _words(about) in _words(said)
    for parsers in ("--empty-", "default: False", "default: None", "default: ()", "[ARGS]", "TOKENS"):
        assert parsers not in said, parsers
    takes_model = command != "facts" and {"model", "base", "a"} & set(
        inspect.signature(_function(command)).parameters
    )
    assert ("A model is a checkpoint folder" in _words(said)) == bool(takes_model)
    takes_facts = "facts" in inspect.signature(_function(command)).parameters
    assert ("FACTS is a file" in _words(said)) == takes_facts


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_names_every_argument_and_what_is_required(command, capsys):
    usage = _help(capsys, command).split("\n\n")[0]
    for argument in app[command].assemble_argument_collection(parse_docstring=True):
        if not argument.show:
            continue
        assert argument.parameter.help, f"{argument.name} is not described"
        if argument.field_info.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            assert argument.field_info.names[0].upper().lstrip("*") in usage
        elif argument.required:
            assert argument.name in usage or "-o " in usage, argument.name


def test_edit_says_that_each_method_has_its_own_options_and_groups_its_own(capsys):
    said = _help(capsys, "edit")
    assert "locus methods NAME the options of one" in _words(said)
    for group in ("Where it may change", "What must stay", "Controls for the audit", "Large models", "Sweep"):
        assert f"─ {group} ─" in said


def test_the_first_page_has_a_line_for_every_command():
    fresh = [sys.executable, "-m", "locus", "--help"]  # here the commands may have been imported before
    page = subprocess.run(fresh, capture_output=True, text=True, check=True).stdout
    for command in COMMANDS:
        first = inspect.cleandoc(_function(command).__doc__ or "").split("\n")[0]
        assert _words(first) in _words(page)
        assert re.search(rf"│ {command} +\w", page)


def test_the_page_of_a_method_shows_nothing_of_the_parser(capsys):
    for name in ("npo", "alphaedit", "audit", "causal-trace", "saliency"):
        assert execute(["methods", name]) == 0
        said = capsys.readouterr().out
        assert "--empty-" not in said and "default: False" not in said and "default: None" not in said
