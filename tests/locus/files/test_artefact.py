"""Files are there in full or not at all, whatever happens; ours are recognised and checked to the bit."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from locus.errors import InputError
from locus.files import artefact
from locus.files.artefact import (
    atomic_file,
    atomic_folder,
    load_json,
    load_tensors,
    lock,
    open_tensors,
    save_json,
    save_tensors,
)

TENSORS = {
    "b": torch.randn(3, 4).bfloat16(),
    "a": torch.arange(5),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".locus-tmp")]


def _one_line(error: pytest.ExceptionInfo[InputError], path: Path) -> None:
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


# ---- atomic


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.txt"
    with atomic_file(path) as temp:
        temp.write_text("half")
        assert not path.exists()
        temp.write_text("whole")
    assert path.read_text() == "whole"
    assert _leftovers(path.parent) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as temp:
        temp.write_text("new")
        raise KeyError
    assert path.read_text() == "old"
    assert _leftovers(tmp_path) == []


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    with atomic_folder(path) as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "x").write_text("1")
        assert not any(path.iterdir())
    assert (path / "sub" / "x").read_text() == "1"
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other") as temp:
        (temp / "x").write_text("1")
        raise KeyError
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    with pytest.raises(InputError, match="there already and not empty") as error, atomic_folder(path):
        pass
    _one_line(error, path)


def test_errors_of_the_callers_own_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x"):
        (tmp_path / "not-there").read_text()
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "y"):
        (tmp_path / "not-there").read_text()
    assert list(tmp_path.iterdir()) == []


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for path, says in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "file" / "x", "a file stands where a folder is needed"),
        (tmp_path / ("x" * 250), "choose a shorter name"),
        (Path("/proc/nowhere/x"), "write elsewhere"),
    ):
        with pytest.raises(InputError, match=says) as error:
            save_json(path, "audit", {})
        _one_line(error, path)
        with pytest.raises(InputError), atomic_folder(path):
            (path / "folder").mkdir()  # only reached where `path` is an empty folder
            raise InputError("empty folders may be filled")
    with pytest.raises(InputError, match="is a file"), lock(tmp_path / "file"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="change its permissions"):
        save_json(tmp_path / "x", "audit", {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "locus-test", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "x.safetensors"
    save_tensors(path, "mask", TENSORS, {})
    old = path.read_bytes()
    big = {"w": torch.zeros(1 << 20)}
    for target in (path, small_disk / "new.safetensors"):
        with pytest.raises(InputError, match="No space left on device; free some space") as error:
            save_tensors(target, "mask", big, {})
        _one_line(error, target)
    assert path.read_bytes() == old
    with pytest.raises(InputError, match="free some space"), atomic_folder(small_disk / "out") as temp:
        (temp / "x").write_bytes(bytes(2 << 20))
    assert [p.name for p in small_disk.iterdir()] == ["x.safetensors"]


def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match="Read-only file system; write elsewhere"):
        save_json(small_disk / "x", "audit", {})
    with pytest.raises(InputError, match="Read-only file system; write elsewhere"), lock(small_disk / "new"):
        pass


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    """`ulimit -f`, without root: as on a full disk the old file stays and nothing new is left."""
    path = tmp_path / "x.safetensors"
    save_tensors(path, "mask", TENSORS, {})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(InputError, match="File too large"):
            save_tensors(path, "mask", {"w": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert _leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "x.json"
    save_json(path, "audit", {"n": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match="free some space"):
        save_json(path, "audit", {"n": 2})
    assert load_json(path, "audit") == {"n": 1}
    assert _leftovers(tmp_path) == []


def test_file_and_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        sync(fd)

    def renamed(a: Path, b: Path) -> None:
        calls.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    save_json(tmp_path / "x", "audit", {})
    assert calls == ["file", "rename", "folder"]


def test_leftovers_of_the_dead_are_swept_and_of_the_living_are_not(tmp_path: Path) -> None:
    for name in ("x.json", "out"):
        dead = tmp_path / f".{name}.{'0' * 16}.locus-tmp"
        dead.mkdir() if name == "out" else dead.write_text("half")
    stranger = tmp_path / ".y.json.0000000000000000.locus-tmp"
    stranger.write_text("another target's")
    with atomic_file(tmp_path / "x.json") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "x.json") as second:
            assert first.exists()
            second.write_text("second")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "x.json").read_text() == "first", "the last to finish wins"
    assert _leftovers(tmp_path) == [stranger.name]


_WRITER = """
import sys, itertools, torch
from locus.files.artefact import save_tensors, atomic_folder
print("ready", flush=True)
for i in itertools.count(int(sys.argv[2])):
    save_tensors(sys.argv[1] + "/x.safetensors", "mask", {"w": torch.full((200_000,), i)}, {"i": i})
"""


def test_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    generator = random.Random(0)
    seen = set()
    for round_ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(1000 * round_)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(generator.uniform(0.01, 0.08))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if (tmp_path / "x.safetensors").exists():
            tensors, meta = load_tensors(tmp_path / "x.safetensors", "mask")
            assert tensors["w"].tolist() == [meta["i"]] * 200_000
            seen.add(meta["i"])
    assert len(seen) > 1
    save_tensors(tmp_path / "x.safetensors", "mask", {}, {})
    assert _leftovers(tmp_path) == []


# ---- our artefacts


def test_tensors_come_back_and_the_reference_library_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, "mask", TENSORS, {"k": [1, None, "é"], "z": {"y": 0.5}})
    tensors, meta = load_tensors(path, "mask")
    assert meta == {"k": [1, None, "é"], "z": {"y": 0.5}}
    theirs = load_file(path)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert torch.equal(theirs[name], tensor)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["locus"])["format"] == "mask"


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", "mask", TENSORS, {"x": 1, "y": 2})
    save_tensors(tmp_path / "b", "mask", dict(reversed(TENSORS.items())), {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    save_json(tmp_path / "c", "audit", {"x": 1, "y": {"b": 1, "a": 2}})
    save_json(tmp_path / "d", "audit", {"y": {"a": 2, "b": 1}, "x": 1})
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, "mask", {"w": torch.arange(9), "v": torch.ones(3)}, {"k": 1})
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :])
        with pytest.raises(InputError) as error:
            load_tensors(path, "mask")
        assert "\n" not in str(error.value)
        path.write_bytes(good[:i])
        with pytest.raises(InputError):
            load_tensors(path, "mask")
    path.write_bytes(good)
    load_tensors(path, "mask")


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_tensors(tmp_path / "mask", "mask", {}, {})
    save_json(tmp_path / "audit.json", "audit", {})
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs")
    save_file({"a": torch.zeros(1)}, tmp_path / "odd", metadata={"locus": "{"})
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "newer", metadata={"locus": '{"format": "mask", "version": 99}'}
    )
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"format": "audit"')
    (tmp_path / "newer.json").write_text('{"format": "audit", "version": 99}')
    (tmp_path / "latin.json").write_bytes(b'{"x": "\xff"}')
    for name, says in (
        ("nothing", "there is no such file"),
        ("mask", "holds kind 'mask', 'delta' was expected"),
        ("theirs", "not written by locus"),
        ("odd", "damaged"),
    ):
        with pytest.raises(InputError, match=says) as error:
            load_tensors(tmp_path / name, "delta")
        _one_line(error, tmp_path / name)
    with pytest.raises(InputError, match="format version 99"):
        open_tensors(tmp_path / "newer", "mask")
    for name, says in (
        ("nothing.json", "there is no such file"),
        ("list.json", "not written by locus"),
        ("cut.json", "not JSON"),
        ("latin.json", "not JSON"),
        ("newer.json", "format version 99"),
    ):
        with pytest.raises(InputError, match=says) as error:
            load_json(tmp_path / name, "audit")
        _one_line(error, tmp_path / name)
    with pytest.raises(InputError, match="holds kind 'audit'"):
        load_json(tmp_path / "audit.json", "export")


def test_nan_never_gets_into_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"audit\.rows\[1\]\.kl is nan"):
        save_json(tmp_path / "x", "audit", {"rows": [{"kl": 1.0}, {"kl": float("nan")}]})
    with pytest.raises(ValueError, match=r"mask\.k is inf"):
        save_tensors(tmp_path / "x", "mask", {}, {"k": float("inf")})
    with pytest.raises(ValueError, match="own key"):
        save_json(tmp_path / "x", "audit", {"format": 1})
    assert list(tmp_path.iterdir()) == []


_HOLDER = """
import sys, time
from locus.files.artefact import lock
from locus.errors import InputError
try:
    with lock(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
except InputError as error:
    print(error, flush=True)
"""


def _holder(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process that takes the lock of a folder, and what it says."""
    command = [sys.executable, "-c", _HOLDER, str(folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "[-Infinity]"])
def test_what_could_not_be_written_again_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'{{"format": "mask", "version": 1, "said": {value}}}')
    with pytest.raises(InputError, match="damaged") as error:
        load_json(path, "mask")
    _one_line(error, path)


def test_one_run_a_folder_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with lock(folder):
        with pytest.raises(InputError, match="another run is writing there"), lock(folder):
            pass
        process, says = _holder(folder)
        with process:
            assert "another run is writing there" in says
    process, says = _holder(folder)
    with process:
        assert says == "held\n"
        with pytest.raises(InputError), lock(folder):
            pass
        process.kill()
    with lock(folder):
        pass


def test_the_version_is_written(tmp_path: Path) -> None:
    save_json(tmp_path / "x", "audit", {"b": 1})
    assert json.loads((tmp_path / "x").read_text()) == {
        "format": "audit",
        "version": artefact.VERSION,
        "b": 1,
    }
    assert (tmp_path / "x").read_text().startswith('{\n  "format": "audit",\n  "version"')
