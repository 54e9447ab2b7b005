"""Benchmarks as named suites: their own files in, their published figures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.state import State
from locus.errors import InputError
from locus.fact import Fact, read_facts


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

    def run(self, state: State, context: Context) -> FigureValues:
        """Measure one state."""


@dataclass(frozen=True)
class FactSuite:
    """Fact files: everything about them is in the audit itself."""

    facts: Sequence[Fact]
    retain: Sequence[Fact] = ()
    figures: tuple[str, ...] = ()

    def run(self, state: State, context: Context) -> FigureValues:
        """Nothing further."""
        return FigureValues()


def load_suite(name: str, place: str | Path, limit: int | None = None) -> Suite:
    """Read a suite from the user's disk or from the hub.

    Args:
        name: One of `SUITES`.
        place: The fact file ("facts", "counterfact"), the folder of the benchmark's files (or, for TOFU, one of
            its forget files), or hf://owner/dataset.
        limit: At most so many questions of each set.

    Raises:
        InputError: an unknown suite, a missing or empty file, or a record that is not of that benchmark.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be 1 or more")
    return SUITES[name](str(place), limit)


def _facts(place: str, limit: int | None) -> Suite:
    return FactSuite(read_facts(place, limit=limit))


def _counterfact(place: str, limit: int | None) -> Suite:
    return FactSuite(read_facts(place, "counterfact", limit=limit))


def _tofu(place: str, limit: int | None) -> Suite:
    from locus.audit.suites.tofu import read_tofu

    return read_tofu(place, limit)


def _muse(place: str, limit: int | None) -> Suite:
    from locus.audit.suites.muse import read_muse

    return read_muse(place, limit)


def _wmdp(place: str, limit: int | None) -> Suite:
    from locus.audit.suites.wmdp import read_wmdp

    return read_wmdp(place, limit)


SUITES: Mapping[str, Callable[[str, int | None], Suite]] = {
    "facts": _facts,
    "counterfact": _counterfact,
    "tofu": _tofu,
    "muse": _muse,
    "wmdp": _wmdp,
}
"""Name -> reader."""
