"""Files that are there in full or not at all: atomic writing, our safetensors and JSON artefacts, the lock.

Everything is written beside its place under a recognisable name, `.NAME.<hex>.locus-tmp`, flushed to the
disk and renamed. The writer holds a lock on what it writes; a kill releases it, and the next run that
writes the same path removes what was left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from locus.errors import InputError
from locus.files.tensorfile import TensorFile, header_of, in_file_order, tensor_bytes

VERSION = 1
"""Format version of every artefact. A reader refuses a newer one."""
_TEMP = "locus-tmp"
_UNHASHED = "0" * 64
_MENDS = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some of your quota or write elsewhere",
    errno.EFBIG: "the file system or a limit (ulimit -f) refuses files of this size; write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions or write elsewhere",
    errno.EPERM: "change its permissions or write elsewhere",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a file stands where a folder is needed; remove it or write elsewhere",
    errno.EEXIST: "a file stands where a folder is needed; remove it or write elsewhere",
    errno.ENOTEMPTY: "the folder is not empty; name a new one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "it cannot be made there; write elsewhere",
    errno.EIO: "the disk reports an error; write elsewhere",
}
_ALWAYS_OURS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write a file that appears under its name only when it is complete.

    Yields a path beside `path` to write to. When the block ends it is flushed to the disk and renamed; when
    the block raises it is removed and `path` is as it was. Parent folders are made.

    Raises:
        InputError: `path` cannot be written: a folder is there, the disk is full, no permission, ….
    """
    path = Path(path)
    with _explained(path):
        if path.is_dir():
            raise InputError(f"{path}: is a folder, a file was to be written there; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temp, fd = _claim(path, folder=False)
    try:
        with _explained(path, temp):
            yield temp
            _flush(temp)
            os.replace(temp, path)
            _flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        os.close(fd)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder that appears under its name only when it is complete.

    Yields a folder beside `path` to fill. When the block ends all of it is flushed to the disk and it is
    renamed; when the block raises it is removed.

    Raises:
        InputError: `path` exists and is not an empty folder, or cannot be written.
    """
    path = Path(path)
    with _explained(path):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file, a folder was to be written there; name a new folder")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path}: is there already and not empty; name a new folder or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        temp, fd = _claim(path, folder=True)
    try:
        with _explained(path, temp):
            yield temp
            for parent, _, files in os.walk(temp, topdown=False):
                for file in files:
                    _flush(Path(parent, file))
                _flush(Path(parent))
            os.rename(temp, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        os.close(fd)


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write one of our safetensors artefacts, atomically; the same content gives the same bytes.

    Args:
        path: Where to.
        kind: What it is ("mask", "delta", …); `load_tensors` asks for it.
        tensors: Any shapes and dtypes that safetensors knows.
        meta: JSON values to keep in the header.

    Raises:
        InputError: it cannot be written.
        ValueError: `meta` holds NaN or an infinity, which JSON has not.
    """
    _refuse_nonfinite(meta, kind)
    ordered = in_file_order(tensors)
    about = json.dumps({"format": kind, "version": VERSION, **meta}, sort_keys=True, ensure_ascii=False)
    unsigned = header_of(ordered, {"locus": about, "sha256": _UNHASHED})
    digest = hashlib.sha256(unsigned)
    for tensor in ordered.values():
        digest.update(tensor_bytes(tensor))
    with atomic_file(path) as temp, open(temp, "wb") as file:
        file.write(header_of(ordered, {"locus": about, "sha256": digest.hexdigest()}))
        for tensor in ordered.values():
            file.write(tensor_bytes(tensor))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an artefact that `save_tensors` wrote, checking every bit of it.

    Returns:
        The tensors and the `meta` they were saved with.

    Raises:
        InputError: missing, truncated, damaged, not ours, of another kind, or of a newer format.
    """
    file, meta = open_tensors(path, kind)
    return {name: file.read(name) for name in file.tensors}, meta


def open_tensors(path: str | Path, kind: str) -> tuple[TensorFile, dict[str, Any]]:
    """Check an artefact as `load_tensors` does, but leave its tensors on the disk to be read one by one."""
    file = TensorFile(path)
    try:
        meta = json.loads(file.metadata.get("locus", "null"))
    except ValueError as error:
        raise InputError(f"{path}: damaged: its description is not JSON; write it again") from error
    meta = _checked(Path(path), kind, meta)
    claimed = file.metadata.get("sha256", "")
    signed, unsigned = (f'"sha256":"{value}"'.encode() for value in (claimed, _UNHASHED))
    digest = hashlib.sha256(file.header.replace(signed, unsigned))
    for piece in file.payload():
        digest.update(piece)
    if digest.hexdigest() != claimed:
        raise InputError(f"{path}: damaged: its bytes do not match its own sha256; copy or write it again")
    return file, meta


def save_json(path: str | Path, kind: str, obj: Mapping[str, Any]) -> None:
    """Write a JSON artefact, atomically: `format`, `version`, then the keys of `obj` sorted.

    Raises:
        InputError: it cannot be written.
        ValueError: `obj` holds NaN or an infinity, which JSON has not.
    """
    if taken := {"format", "version"} & set(obj):
        raise ValueError(f"{sorted(taken)[0]!r} is the artefact's own key")
    _refuse_nonfinite(obj, kind)
    ordered = json.loads(json.dumps(obj, sort_keys=True))
    text = json.dumps({"format": kind, "version": VERSION, **ordered}, indent=2, ensure_ascii=False)
    with atomic_file(path) as temp:
        temp.write_text(text + "\n", encoding="utf-8")


def load_json(path: str | Path, kind: str) -> dict[str, Any]:
    """Read an artefact that `save_json` wrote.

    Raises:
        InputError: missing, not JSON, not ours, of another kind, or of a newer format.
    """
    path = Path(path)
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: not JSON ({error}); write it again") from error
    return _checked(path, kind, obj)


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep an output folder to one run. The folder is made; the lock dies with the process that holds it.

    Raises:
        InputError: another run holds it, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    with _explained(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, an output folder is needed; name another")
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".locus.lock", timeout=0)
        try:
            held.acquire()
        except Timeout:
            raise InputError(f"{folder}: another run is writing there; wait or name another folder") from None
        except NotImplementedError as error:  # filelock's word for a file system without flock
            raise InputError(f"{folder}: its file system has no locks; name a folder elsewhere") from error
    try:
        yield
    finally:
        held.release()


def _checked(path: Path, kind: str, meta: Any) -> dict[str, Any]:
    """`meta` without its format and version, once they are what is wanted."""
    if not isinstance(meta, dict) or not isinstance(meta.get("format"), str):
        raise InputError(f"{path}: not written by locus (a {kind} was expected)")
    if meta["format"] != kind:
        raise InputError(f"{path}: holds kind {meta['format']!r}, {kind!r} was expected")
    version = meta.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise InputError(f"{path}: format version {version!r}, this locus reads {VERSION}; upgrade it")
    try:  # what cannot be written again, NaN or half a character, was never written by us
        _refuse_nonfinite(meta, kind)
        json.dumps(meta, ensure_ascii=False).encode()
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}; write it again") from error
    return {key: value for key, value in meta.items() if key not in ("format", "version")}


def _refuse_nonfinite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: JSON has no such number")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_nonfinite(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _refuse_nonfinite(inner, f"{where}[{i}]")


def _claim(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Make a temporary file or folder beside `path` and lock it; the descriptor holds the lock."""
    while True:
        temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}.{_TEMP}")
        if folder:
            temp.mkdir()
            fd = os.open(temp, os.O_RDONLY)
        else:
            fd = os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        # Between its making and its lock another run may have taken it for a leftover and swept it away.
        if _locked(fd) is not False and temp.exists():
            return temp, fd
        os.close(fd)


def _sweep(path: Path) -> None:
    """Remove what killed runs left behind while writing `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.{_TEMP}")
    for left in path.parent.iterdir():
        if not pattern.fullmatch(left.name):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(left, os.O_RDONLY)
            try:
                if _locked(fd):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(fd)


def _locked(fd: int) -> bool | None:
    """Lock without waiting; False where another process holds it, None where there are no such locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _explained(path: Path, temp: Path | None = None) -> Iterator[None]:
    """Turn what the system says of writing `path` into one line that says how to mend it.

    With `temp`, the block is the caller's: errors that do not concern the file being written pass through.
    """
    try:
        yield
    except OSError as error:
        names = (error.filename, error.filename2)
        named = [Path(os.fsdecode(name)) for name in names if isinstance(name, str | bytes)]
        inside = any(name == temp or temp in name.parents for name in named)
        ours = temp is None or inside or error.errno in _ALWAYS_OURS
        if not ours or error.errno not in _MENDS:
            raise
        raise InputError(f"{path}: cannot be written: {error.strerror}; {_MENDS[error.errno]}") from error
