"""The tree: few rooms at the top of each package, and tests that stand where their module stands."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_A_FOLDER = {
    "tests/locus/audit/attacks/test_attacks.py",
    "tests/locus/audit/attacks/test_hidden_knowledge.py",
    "tests/locus/audit/suites/test_suites.py",
    "tests/locus/audit/test_coverage.py",
    "tests/locus/cli/edit/test_direct_edits.py",
    "tests/locus/cli/test_errors.py",
    "tests/locus/cli/test_shared_options.py",
    "tests/locus/report/test_report.py",
    "tests/locus/test_device_map.py",
    "tests/locus/test_lens_grid.py",
    "tests/tracing/localizers/test_not_finite.py",
}
"""Tests of what several modules of one folder do."""


@pytest.mark.parametrize(("package", "most"), [("tracing", 12), ("editors", 12), ("locus/audit", 20)])
def test_few_rooms_stand_at_the_top_of_a_package(package, most):
    here = [
        path for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    rooms = sorted(path.stem for path in here if path.name != "__init__.py")
    assert len(rooms) <= most, rooms


def test_tests_stand_where_their_module_stands():
    astray = []
    for path in sorted(ROOT.glob("tests/*/**/test_*.py")):
        name = path.relative_to(ROOT).as_posix()
        module = ROOT / path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_"))
        if path.relative_to(ROOT / "tests").parts[0] not in ("locus", "tracing", "editors"):
            continue  # contracts, together, benchmarks
        if not module.exists() and name not in OF_A_FOLDER:
            astray.append(name)
    assert not astray, f"no module of the same name: {astray}"
    assert not [name for name in OF_A_FOLDER if not (ROOT / name).exists()]
