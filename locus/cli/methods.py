"""`locus methods`: what there is, straight from the tables and the methods' own words."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from locus.cli.options import Talking, method_app

TITLE = """# Localizers

Written by `locus methods --markdown` from the docstrings; `locus methods NAME` shows the same on the terminal. Every
one is called alike, `locus locate MODEL FACTS --method NAME --budget 1% -o mask.safetensors`, or in Python
`LOCALIZERS[NAME](option=value).run(model, facts, retain).top("1%")`. A neuron of a gated MLP is its key vectors (gate
and up) and its value vector (down); `--parts` says which of them a mask takes. How the neuron
localizers do where the truth is known: [benchmarks](../benchmarks/README.md).
"""


def methods(
    name: str | None = None,
    /,
    *,
    markdown: Annotated[bool, Parameter(negative="")] = False,
    talking: Talking = Talking(),
) -> None:
    """List the localizers, editors and attacks; or of one, its formula, source, cost, when to use it, and its options.

    Args:
        name: A method; audit shows the settings of the audit.
        markdown: Print a page about all localizers.
    """
    from editors import EDITORS
    from locus.audit import AuditSettings
    from locus.audit.attacks.table import ATTACKS, BUILT_IN
    from locus.errors import InputError
    from tracing import LOCALIZERS, CausalTrace

    tables: dict[str, dict[str, type[Any]]] = {
        "trace": {"causal-trace": CausalTrace},
        "locate": LOCALIZERS,
        "edit": EDITORS,
    }
    if markdown:
        print(localizer_page(LOCALIZERS), end="")
        return
    if name is None:
        listing = {
            command: {m: _first_line(cls) for m, cls in table.items()} for command, table in tables.items()
        }
        listing["audit --attacks"] = {**BUILT_IN, **{attack: what for attack, (_, what) in ATTACKS.items()}}
        talking.finish(listing, _table(listing))
        return
    if name == "audit" and not talking.json:
        method_app("locus audit", AuditSettings).help_print([])
        return
    found = [(command, table[name]) for command, table in tables.items() if name in table]
    if not found:
        raise InputError(f"{name}: no such method; `locus methods` lists them")
    for command, cls in found:
        if talking.json:
            defaults = {f.name: _default(f) for f in fields(cls)}
            page: dict[str, Any] = {"what": _first_line(cls), "about": about(cls), "options": defaults}
            if is_deterministic(cls):
                page["deterministic"] = True
            talking.finish({"command": command, "method": name, **page}, "")
        else:
            print(f"{about(cls)}\n")
            if is_deterministic(cls):
                print("Deterministic: nothing is drawn at random, so --seed changes nothing.\n")
            method_app(f"locus {command} --method {name}", cls).help_print([])


def about(cls: type[Any]) -> str:
    """Formula, source, cost and use: what stands at the head of the method's file."""
    return inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")


def _default(option: Field[Any]) -> Any:
    """An option's default as a JSON value; None where there is none."""
    default = option.default
    if default is MISSING and option.default_factory is not MISSING:
        default = option.default_factory()
    if default is MISSING:
        return None
    return asdict(default) if is_dataclass(default) and not isinstance(default, type) else default


def is_deterministic(cls: type[Any]) -> bool:
    """Whether the method declares that every seed gives the same result (`deterministic`, a class attribute)."""
    from editors.editor import Deterministic

    made = cls()
    return isinstance(made, Deterministic) and made.deterministic


def localizer_page(table: dict[str, type[Any]]) -> str:
    """All localizers in Markdown: those of one file together, under their names, with their options."""
    files: dict[str, list[str]] = {}
    for name, cls in table.items():
        files.setdefault(cls.__module__, []).append(name)
    blocks = [TITLE]
    for names in files.values():
        blocks.append("## " + ", ".join(f"`{name}`" for name in names) + "\n")
        blocks.append("\n".join(_markdown(about(table[names[0]]))) + "\n")
        for name in names:
            options = ", ".join(f"`{f.name}` {f.default!r}" for f in fields(table[name]))
            blocks.append(
                f"- **`{name}`** {_first_line(table[name])}" + (f" Options: {options}." if options else "")
            )
        blocks.append("")
    return "\n".join(blocks)


def _markdown(text: str) -> Iterator[str]:
    """Indented formulas become code blocks, which want an empty line around them."""
    formula = listed = False
    before = ""
    for line in text.splitlines():
        listed = line.startswith("- ") or (listed and line.startswith(" "))
        indented = line.startswith("    ") and not listed
        if indented != formula and line:
            if before:
                yield ""
            formula = indented
        yield line
        before = line


def _first_line(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _table(listing: dict[str, dict[str, str]]) -> Any:
    from rich.table import Table

    table = Table(
        box=None,
        pad_edge=False,
        title="locus COMMAND --method NAME",
        title_justify="left",
    )
    table.add_column("command")
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    for command, rows in listing.items():
        for i, (method, line) in enumerate(rows.items()):
            table.add_row(command if i == 0 else "", method, line)
    return table
