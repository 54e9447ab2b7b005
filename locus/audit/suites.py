"""Benchmarks as named suites: their own files in, their published figures out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from locus.audit.context import Context
from locus.audit.interval import Items
from locus.audit.state import State
from locus.errors import InputError
from locus.fact import Fact, read_facts


@dataclass(frozen=True)
class Found:
    """What a suite measured of one state."""

    items: Mapping[str, Items] = field(default_factory=dict)
    """Figure key -> one value an item."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Figure key -> one number for the whole set."""


@runtime_checkable
class Suite(Protocol):
    """A benchmark that was read from disk."""

    @property
    def facts(self) -> Sequence[Fact]:
        """What had to be forgotten."""

    @property
    def retain(self) -> Sequence[Fact]:
        """What had to stay."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Keys of the figures it can measure."""

    def run(self, state: State, context: Context) -> Found:
        """Measure one state."""


@dataclass(frozen=True)
class FactSuite:
    """Fact files: everything about them is in the audit itself."""

    facts: Sequence[Fact]
    retain: Sequence[Fact] = ()
    figures: tuple[str, ...] = ()

    def run(self, state: State, context: Context) -> Found:
        """Nothing further."""
        return Found()


def load_suite(name: str, place: str | Path, limit: int | None = None) -> Suite:
    """Read a suite from the user's disk.

    Args:
        name: One of `SUITES`.
        place: The fact file ("facts", "counterfact"), or the folder of the benchmark's files.
        limit: At most so many questions of each set.

    Raises:
        InputError: an unknown suite, a missing or empty file, or a record that is not of that benchmark.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name](Path(place), limit)


def read_records(path: Path, limit: int | None, *needed: str) -> list[dict[str, Any]]:
    """JSON records of a file, one array or one object a line, each with the fields needed.

    Raises:
        InputError: no such file, not JSON, empty, or a record without one of the fields.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the suite needs it")
    text = path.read_text(encoding="utf-8")
    try:
        records = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.splitlines() if x]
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not records:
        raise InputError(f"{path}: an empty suite; nothing can be measured with it")
    out = []
    for i, record in enumerate(records[:limit]):
        record = {"text": record} if isinstance(record, str) else record
        if absent := [key for key in needed if not isinstance(record, dict) or key not in record]:
            raise InputError(
                f"{path}, record {i + 1}: no field {absent[0]!r}; is this the right benchmark's file?"
            )
        out.append(record)
    return out


def _facts(place: Path, limit: int | None) -> Suite:
    return FactSuite(read_facts(place, limit=limit))


def _counterfact(place: Path, limit: int | None) -> Suite:
    return FactSuite(read_facts(place, "counterfact", limit=limit))


def _tofu(place: Path, limit: int | None) -> Suite:
    from locus.audit.tofu import read_tofu

    return read_tofu(place, limit=limit)


def _muse(place: Path, limit: int | None) -> Suite:
    from locus.audit.muse import read_muse

    return read_muse(place, limit=limit)


def _wmdp(place: Path, limit: int | None) -> Suite:
    from locus.audit.wmdp import read_wmdp

    return read_wmdp(place, limit=limit)


SUITES: Mapping[str, Callable[[Path, int | None], Suite]] = {
    "facts": _facts,
    "counterfact": _counterfact,
    "tofu": _tofu,
    "muse": _muse,
    "wmdp": _wmdp,
}
"""Name -> reader."""
