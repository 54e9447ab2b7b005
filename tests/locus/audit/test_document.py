"""audit.json is what SCHEMA.md says: no field that it does not know, none that it promises and is not there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import locus.audit
from locus.audit import AuditSettings, RelearnAttack, audit, read_audit
from locus.delta import WeightDelta
from tests.locus.audit.audit_model import TEXT, facts, knowing, never_knew, scrambled

FIGURE = {"mean", "low", "high", "n", "n_items"}
ROW = re.compile(r"^\| `([^`]+)` \| (\(?)(\w+)(\??)\)? \|")


def _promised() -> dict[str, tuple[str, bool, bool]]:
    """Path -> type, whether it may be absent, whether it may be null."""
    page = Path(locus.audit.__file__).with_name("SCHEMA.md").read_text("utf-8")
    rows = [found for line in page.splitlines() if (found := ROW.match(line))]
    return {r[1]: (r[3], bool(r[2]), bool(r[4])) for r in rows}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An audit with everything that a tiny model can be put through."""
    base, edited = knowing(), never_knew()
    delta = WeightDelta.between(base, edited)
    settings = AuditSettings(
        attacks=("lens", "relearn", "relearn-lora", "rounding", "strength", "probe", "depth"),
        relearn=RelearnAttack(at=(1, 2)),
    )
    control = {"random": scrambled(base, edited, 0)}
    done = audit(base, {"edit": delta}, *facts(), TEXT, control, never_knew=edited, settings=settings)
    done = replace(done, notes=("the edit was made in conversation",))
    folder = tmp_path_factory.mktemp("audit")
    path = done.save(folder)
    assert read_audit(folder).items() <= json.loads(path.read_text()).items()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every path of a document down to what is no container, list items as []."""
    if isinstance(value, dict) and value and not value.keys() >= FIGURE | {"n"}:
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{path}.{k}" if path else k)]
    if isinstance(value, list) and value:
        return [leaf for item in value for leaf in _leaves(item, f"{path}[]")]
    return [(path, value)]


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\*", r"[^\[\]]+"))


def _is(kind: str, value: Any) -> bool:
    checks = {
        "text": lambda v: isinstance(v, str),
        "truth": lambda v: isinstance(v, bool),
        "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
        "figure": lambda v: isinstance(v, dict) and v.keys() >= FIGURE,
        "object": lambda v: True,
    }
    return checks[kind](value)


def _row_of(path: str, promised: dict[str, tuple[str, bool, bool]]) -> str | None:
    """The row that tells of a path: itself, else the one with the fewest wildcards, else an object above it."""
    fits = [row for row in promised if _pattern(row).fullmatch(path)]
    if fits:
        return min(fits, key=lambda row: row.count("*"))
    above = [row for row, (kind, *_) in promised.items() if kind == "object"]
    return next((row for row in above if re.match(_pattern(row).pattern + r"[.\[]", path)), None)


def test_every_field_is_told_of_with_its_type(document: dict[str, Any]) -> None:
    promised = _promised()
    assert len(promised) > 60
    for path, value in _leaves(document):
        if value in ({}, []):
            continue
        if path == "comparisons[]":  # carries its interval among its fields
            for key, inner in value.items():
                kind, _, nullable = promised[f"comparisons[].{key}"]
                assert nullable if inner is None else _is(kind, inner), key
            continue
        row = _row_of(path, promised)
        assert row is not None, f"{path} is not in SCHEMA.md"
        kind, _, nullable = promised[row]
        assert kind == "object" or (nullable if value is None else _is(kind, value)), (path, value)


def test_every_promise_is_kept(document: dict[str, Any]) -> None:
    paths = {path for path, _ in _leaves(document)}
    paths |= {f"comparisons[].{key}" for c in document["comparisons"] for key in c}
    for row, (kind, _, _) in _promised().items():
        pattern = _pattern(row)
        assert any(pattern.fullmatch(p) or (kind == "object" and pattern.match(p)) for p in paths), row


def test_the_document_is_json_without_nan_and_names_its_version(document: dict[str, Any]) -> None:
    json.dumps(document, allow_nan=False)
    assert document["schema"] == 1 and document["format"] == "audit"
