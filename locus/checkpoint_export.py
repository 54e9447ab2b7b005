"""Checkpoint folders: read in a stream, written whole or not at all, compared bit by bit.

Export streams: it rewrites the files that hold a touched tensor, piece by piece, and copies the others byte
for byte. Its memory is the new values of the few tensors in work, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from locus.checkpoint import INDEX, SINGLE, Checkpoint
from locus.checkpoint_diff import DiffReport, TensorDiff, diff, same_bytes
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.files.artefact import atomic_folder, load_json, save_json
from locus.files.tensorfile import TensorFile, n_threads
from locus.fingerprint import fingerprint_of, started
from locus.progress import Task, task
from locus.tensor_delta import new_values

__all__ = [
    "Checkpoint",
    "DiffReport",
    "ExportReport",
    "TensorDiff",
    "diff",
    "export",
    "fingerprint_of",
    "revert",
]

RECORD = "locus.json"
"""What an export leaves in its folder beside the model: which delta it applied, and what came out."""
_CARRIED = (".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken", ".spm")
_NOT_CARRIED = (RECORD, INDEX, "trainer_state.json")
_PIECE = 2 << 20  # bytes of a tensor edited at once: they stay in the cache while they are hashed twice


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    folder: str
    delta: str
    """`WeightDelta.id` of what was applied."""
    n_tensors: int
    """Tensors that changed."""
    rewritten: tuple[str, ...]
    """Files that hold a changed tensor."""
    copied: tuple[str, ...]
    """Files of tensors that are byte for byte the base's (hard links where asked for)."""
    carried: tuple[str, ...]
    """Configuration, tokenizer and other small files taken over."""
    left_out: tuple[str, ...]
    """Files of the base that were not taken over: other weights, optimizer states."""
    already_there: bool = False
    """Whether the folder held this very export before."""

    @property
    def summary(self) -> str:
        """One line for a person."""
        if self.already_there:
            return "was already there, checked"
        files = f"{len(self.rewritten)} files rewritten, {len(self.copied)} as they were"
        return f"{self.n_tensors} tensors changed, {files}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    base: str | Path | Checkpoint,
    delta: WeightDelta,
    out: str | Path,
    *,
    link: bool = False,
    resume: bool = False,
) -> ExportReport:
    """Write a checkpoint folder with a delta applied. The base is only read.

    Every touched tensor is checked before (against `delta.before`) and after (against `delta.after`).
    Configuration, tokenizer and other small files come along; other weights and optimizer states do not.

    Args:
        base: The checkpoint folder that the delta was made from.
        delta: What to apply.
        out: The folder to write; it appears under this name only when it is complete.
        link: Hard-link files without a changed tensor instead of copying them. Whoever then writes into one
            of them in place changes both folders.
        resume: Accept an `out` that holds this very export already (every tensor is checked).

    Raises:
        InputError: the base is not the delta's, `out` exists or lies inside the base, or cannot be written.
    """
    base = base if isinstance(base, Checkpoint) else Checkpoint(base)
    out = Path(out)
    _refuse_nested(base.folder, out)
    plan = _plan(base, delta)
    changed = {base.file_of(name) for name in plan}
    carried, left_out = _other_files(base)
    report = ExportReport(
        folder=str(out),
        delta=delta.id,
        n_tensors=len(plan),
        rewritten=tuple(name for name in base.files if name in changed),
        copied=tuple(name for name in base.files if name not in changed),
        carried=carried,
        left_out=left_out,
    )
    if resume and out.is_dir() and any(out.iterdir()):
        _check_same(base, delta, plan, out, report)
        return replace(report, already_there=True)
    with atomic_folder(out) as folder, task("export", base.n_bytes) as progress:
        for name in (*report.rewritten, *report.copied):
            if name in changed:
                _rewrite(base.files[name], folder / name, plan, delta, progress)
            else:
                _copy(base.files[name], folder / name, link)
                progress.advance(base.files[name].size)
        for name in carried:
            _carry(base.folder / name, folder / name)
        Checkpoint(folder)
        save_json(folder / RECORD, "export", _record(delta, plan))
    return report


def revert(
    folder: str | Path | Checkpoint,
    delta: WeightDelta,
    out: str | Path,
    *,
    link: bool = False,
    resume: bool = False,
) -> ExportReport:
    """Write a checkpoint folder with a delta taken out again: every tensor is the base's, bit for bit.

    Args:
        folder: A checkpoint that holds the delta's change, as `export` wrote it.
        delta: What to take out.
        out: As in `export`.
        link: As in `export`.
        resume: As in `export`.

    Raises:
        InputError: `folder` does not hold what the delta makes, or as in `export`.
    """
    return export(folder, delta.inverse(), out, link=link, resume=resume)


def _plan(base: Checkpoint, delta: WeightDelta) -> dict[str, str]:
    """Checkpoint tensor -> the delta's name for what changes it."""
    plan: dict[str, str] = {}
    for name in delta.changes:
        for place in base.places(name):
            rival = plan.setdefault(place, name)
            if (delta.before[rival], delta.after[rival]) != (delta.before[name], delta.after[name]):
                raise InputError(f"{place}: the delta changes it twice, as {rival} and as {name}; unstack it")
    return plan


def _rewrite(
    file: TensorFile, path: Path, plan: Mapping[str, str], delta: WeightDelta, progress: Task
) -> None:
    """Write one file anew: same header, touched tensors edited, everything between them copied.

    Every touched tensor and every gap is a job of its own; threads write to their places in the new file.
    """
    with open(path, "wb", buffering=0) as target, ThreadPoolExecutor(n_threads()) as pool:
        os.truncate(target.fileno(), file.size)
        jobs: list[Future[int]] = []
        done = 0
        for name, info in file.tensors.items():
            if name in plan:
                start = len(file.header) + info.start
                jobs.append(pool.submit(_copy_range, file, target.fileno(), done, start))
                jobs.append(pool.submit(_edit, file, target.fileno(), name, plan[name], delta))
                done = start + info.n_bytes
        jobs.append(pool.submit(_copy_range, file, target.fileno(), done, file.size))
        try:
            for job in as_completed(jobs):
                progress.advance(job.result())
        finally:
            for job in jobs:
                job.cancel()


def _edit(file: TensorFile, target: int, name: str, known: str, delta: WeightDelta) -> int:
    """Write one tensor, edited, piece by piece, hashing what was and what comes; the bytes written.

    Raises:
        InputError: the tensor was not the delta's base, or the delta does not make what it promises.
    """
    info = file.tensors[name]
    selection, values = new_values(delta.changes, known)
    if selection.shape != info.shape or values.dtype != info.dtype:
        raise InputError(
            f"{name}: is {info.dtype} {list(info.shape)} in {file.path} and {values.dtype} "
            f"{list(selection.shape)} in the delta: it was made for another model"
        )
    values = values.reshape(-1)
    before, after = started(info.dtype, info.shape), started(info.dtype, info.shape)
    # A tensor of no dimension is one row; of a row's bytes, as many as come near the size of a piece.
    n_rows = info.shape[0] if info.shape else 1
    at_once = max(1, _PIECE * n_rows // info.n_bytes)
    row, taken, place = 0, 0, len(file.header) + info.start
    for piece in file.chunks(name, at_once * (info.n_bytes // n_rows)):
        before.update(piece)
        rows = min(at_once, n_rows - row)
        window = selection.window(row, row + rows) if info.shape else selection
        part = torch.frombuffer(piece, dtype=info.dtype).view(window.shape)
        window.put_(part, values[taken : taken + window.n].view(window.compact_shape))
        after.update(piece)
        _write(target, piece, place)
        row, taken, place = row + rows, taken + window.n, place + len(piece)
    delta.check_digest(known, before.hexdigest(), str(file.path))
    if after.hexdigest() != delta.after[known]:
        raise InputError(f"{known}: the delta does not make the tensor it promises; it is damaged")
    return info.n_bytes


def _copy(file: TensorFile, path: Path, link: bool) -> None:
    """Copy a whole file, or link it where that was asked for and the file system can."""
    if link:
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(file.path), path)
            return
    with open(path, "wb", buffering=0) as target:
        _copy_range(file, target.fileno(), 0, file.size)


def _copy_range(file: TensorFile, target: int, start: int, stop: int) -> int:
    """Copy bytes `start` to `stop` of a file to the same place in another, inside the kernel where it can."""
    done = start
    while done < stop and hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(file.fileno(), target, min(stop - done, 1 << 30), done, done)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                break
            raise
        if n == 0:
            break
        done += n
    for piece in file.pieces(done, stop):
        _write(target, piece, done)
        done += len(piece)
    return stop - start


def _write(target: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], place + done)


def _carry(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _other_files(base: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the base's other files: those to take over, and those to leave."""
    carried, left_out = [], []
    if SINGLE not in base.files:
        carried.append(INDEX)
    for path in sorted(base.folder.rglob("*")):
        name = path.relative_to(base.folder).as_posix()
        if not path.is_file() or name in base.files or name == INDEX or path.name == RECORD:
            continue
        top = "/" not in name or name.startswith("additional_chat_templates/")
        known = path.suffix in _CARRIED or path.name.startswith(
            ("tokenizer", "LICENSE", "NOTICE", "USE_POLICY")
        )
        weights = path.name.endswith((".safetensors", ".index.json", ".bin", ".pt", ".pth"))
        hidden = path.name.startswith(".")
        if top and known and not weights and not hidden and path.name not in _NOT_CARRIED:
            carried.append(name)
        else:
            left_out.append(name)
    return tuple(carried), tuple(left_out)


def _record(delta: WeightDelta, plan: Mapping[str, str]) -> dict[str, Any]:
    return {
        "base_fingerprint": delta.base_fingerprint,
        "delta": delta.id,
        "provenance": dict(delta.provenance),
        "tensors": {
            name: {"before": delta.before[known], "after": delta.after[known]} for name, known in plan.items()
        },
    }


def _refuse_nested(base: Path, out: Path) -> None:
    inner, outer = Path(os.path.realpath(out)), Path(os.path.realpath(base))
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise InputError(f"{out}: lies inside the base {base} or around it; name a folder beside it")


def _check_same(
    base: Checkpoint, delta: WeightDelta, plan: Mapping[str, str], out: Path, report: ExportReport
) -> None:
    """Refuse a folder that is not, tensor by tensor and file by file, the export that was asked for."""
    other = InputError(f"{out}: is there already and is not this export; name a new folder or remove it")
    if not (out / RECORD).exists() or load_json(out / RECORD, "export").get("delta") != delta.id:
        raise other
    there = Checkpoint(out)
    if list(there.files) != list(base.files) or there.shapes != base.shapes or there.dtypes != base.dtypes:
        raise other
    for name in base.shapes:
        digest = delta.after[plan[name]] if name in plan else None
        if not (there.digest(name) == digest if digest else same_bytes(base, there, name)):
            raise other
    if not all(filecmp.cmp(base.folder / name, out / name, shallow=False) for name in report.carried):
        raise other
