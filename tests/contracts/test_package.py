"""The distribution: what a wheel and an sdist hold, and that an installed one runs without the source beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel made of the sdist; the build backend is that of this environment."""
    pytest.importorskip("hatchling", reason="the build backend is not installed, and nothing is fetched here")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_wheel_and_sdist_hold_what_they_must(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in ROOT.glob("*/**/*"):
        if path.parts[len(ROOT.parts)] in ("locus", "tracing", "editors") and path.is_file():
            name = path.relative_to(ROOT).as_posix()
            assert name in names or "__pycache__" in name, name
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in ("SECURITY.md", "GUARANTEES.md", "constraints.txt", "tests/tiny.py", "locus/py.typed"):
        assert name in inside, name


def test_an_installed_wheel_runs_in_a_clean_environment(built, tmp_path):
    """Its dependencies are those of this environment, which are too large to fetch again."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    target = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "-q",
    ]
    subprocess.run([*install, str(wheel)], check=True)
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    (target / "dependencies.pth").write_text(dependencies + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [tmp_path / "venv" / "bin" / "locus", "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.startswith("locus ")
    where = subprocess.run(
        [
            python,
            "-c",
            "import locus, tracing, editors; print(locus.__file__, tracing.__file__, editors.__file__)",
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(str(tmp_path) in one for one in where.split())
