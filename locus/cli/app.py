"""The subcommands, in the order of the walk. What a command does is said in its own docstring."""

from __future__ import annotations

from collections.abc import Mapping

from cyclopts import App, Group

from locus import __version__
from locus.cli.options import PLAIN

_MODEL = "A model is a checkpoint folder, a hub id (owner/name), or smollm2, which needs no hub."
_FACTS = (
    "FACTS is a file (JSON, JSON lines, CSV, parquet or plain text; `locus facts FILE` shows how it is understood) or "
    "one of the shipped demo-forget, demo-retain."
)
_START = "Start with: locus trace smollm2 demo-forget --limit 2 -o trace"


app = App(
    name="locus",
    suppress_keyboard_interrupt=False,
    version=f"locus {__version__}",
    help="Find where a language model keeps the knowledge that must go, change only those weights, and prove it.",
    help_epilogue=f"{_MODEL} {_FACTS} {_START}",
    default_parameter=PLAIN,
    group_parameters=Group("Options", sort_key=1),
)

_COMMANDS: Mapping[str, tuple[str, str]] = {
    "trace": ("MODEL FACTS", f"{_MODEL} {_FACTS}"),
    "lens": ("MODEL FACTS", f"{_MODEL} {_FACTS}"),
    "locate": ("MODEL FACTS", f"{_MODEL} {_FACTS}"),
    "combine": ("SCORES...", ""),
    "edit": ("MODEL FACTS", f"{_MODEL} {_FACTS}"),
    "ask": ("MODEL [PROMPTS...]", _MODEL),
    "export": ("MODEL", _MODEL),
    "revert": ("CHECKPOINT", ""),
    "diff": ("A B", _MODEL),
    "audit": ("BASE EDITED FACTS", f"{_MODEL} {_FACTS}"),
    "compare": ("AUDITS...", ""),
    "run": ("CONFIG", ""),
    "known": ("MODEL FACTS", f"{_MODEL} {_FACTS}"),
    "facts": ("FILE", ""),
    "methods": ("[NAME]", ""),
    "models": ("", ""),
}
"""Command -> its arguments in order, and what is said of them below its help."""
_OUT = ("trace", "lens", "locate", "combine", "edit", "audit", "compare", "run")
_REQUIRED: Mapping[str, str] = {
    **dict.fromkeys(_OUT, "-o PATH "),
    **dict.fromkeys(("export", "revert"), "--delta PATH -o PATH "),
}
"""Command -> the options it cannot do without."""

_MODULES = {"edit": "edit.command", "locate": "locate.command"}
"""Commands whose file stands in a folder of its own."""

for _order, (_name, (_arguments, _about)) in enumerate(_COMMANDS.items()):
    app.command(
        f"locus.cli.{_MODULES.get(_name, _name)}:{_name}",
        name=_name,
        usage=f"Usage: locus {_name} {_arguments} {_REQUIRED.get(_name, '')}[OPTIONS]".replace("  ", " "),
        help_epilogue=_about,
        sort_key=_order,
    )


def import_commands() -> None:
    """Import every command: the first page shows a line of each one's docstring."""
    for name in _COMMANDS:
        _ = app[name].default_command
