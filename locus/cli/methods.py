"""`locus methods`: what there is, straight from the tables."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from locus.cli.options import Talking, method_app


def methods(name: str | None = None, /, *, talking: Talking = Talking()) -> None:
    """List the localizers and editors, or the options of one.

    Args:
        name: A method, to see its options and their defaults.
    """
    from editors import EDITORS
    from locus.errors import InputError
    from tracing import LOCALIZERS, CausalTrace

    tables: dict[str, dict[str, type[Any]]] = {
        "trace": {"causal-trace": CausalTrace},
        "locate": LOCALIZERS,
        "edit": EDITORS,
    }
    if name is None:
        listing = {
            command: {m: _first_line(cls) for m, cls in table.items()} for command, table in tables.items()
        }
        talking.finish(listing, _table(listing))
        return
    found = [(command, table[name]) for command, table in tables.items() if name in table]
    if not found:
        raise InputError(f"{name}: no such method; `locus methods` lists them")
    for command, cls in found:
        if talking.json:
            defaults = {f.name: None if f.default is MISSING else f.default for f in fields(cls)}
            talking.finish({"command": command, "method": name, "options": defaults}, "")
        else:
            method_app(f"locus {command} --method {name}", cls).help_print([])


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _table(listing: dict[str, dict[str, str]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="locus COMMAND --method NAME", title_justify="left")
    table.add_column("command")
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    for command, rows in listing.items():
        for i, (method, line) in enumerate(rows.items()):
            table.add_row(command if i == 0 else "", method, line)
    return table
