"""One owner a name: no two modules define a public top-level name, but for those listed here with a reason.

A reader who searches for a name finds one thing. Where two ideas share a word, the narrower one says of what it is.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("locus", "tracing", "editors")

COMMAND = "a command carries the name of the library function that it calls"
ALLOWED = {
    "run": "every attack of the audit's table has one, and the command `locus run`",
    "KIND": "the kind of artefact that a module writes, in its header",
    "T": "a type variable",
    "ask": "the audit asks its questions; the command `locus ask` is called by its name",
    **dict.fromkeys(("audit", "compare", "diff", "export", "known", "revert"), COMMAND),
}


def defined(source: str) -> Iterator[str]:
    """Public names that a module's top level defines; what it imports is not its own."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [
                name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def owners(root: Path) -> dict[str, set[str]]:
    """Name -> modules that define it."""
    found: dict[str, set[str]] = defaultdict(set)
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            for name in defined(path.read_text("utf-8")):
                found[name].add(str(path.relative_to(root)))
    return found


def test_every_public_name_has_one_owner() -> None:
    shared = {name: sorted(where) for name, where in owners(ROOT).items() if len(where) > 1}
    assert {name: where for name, where in shared.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(shared), "an exception that is no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "def found(): ...",
        "class found: ...",
        "found = 1",
        "found: int = 1",
        "a = found = 2",
        "found, b = 1, 2",
    ],
)
def test_every_way_of_defining_a_name_is_seen(source: str) -> None:
    assert "found" in set(defined(source))
    assert "found" not in set(defined(f"def outer():\n    {source}\nfrom found import x as y\nimport found"))


def test_a_second_owner_is_found(tmp_path: Path) -> None:
    for package, text in (
        ("locus", "class Point: ..."),
        ("tracing", "Point = tuple"),
        ("editors", "_Point = 1"),
    ):
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text(text)
    assert owners(tmp_path)["Point"] == {"locus/one.py", "tracing/one.py"}
