"""The safetensors format, read and written in a stream with plain file reads.

The reference library maps whole files into memory; here a tensor is read when it is asked for and nothing
else is, so that a checkpoint of any size needs the memory of one tensor. Every header is checked in full
before anything is believed (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from locus.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 8 << 20
"""Bytes read at once where a tensor is streamed rather than held."""
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, as its header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int
    """One past the last byte, counted from the end of the header."""

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start


class TensorFile:
    """A safetensors file, open for reading; safe to read from several threads at once.

    The file stays open while the object lives, so what is read later belongs to the header read now even
    if the file is replaced in between.

    Attributes:
        path: Where it is.
        header: Its first bytes up to the tensors, verbatim.
        metadata: The header's `__metadata__`.
        tensors: Name -> TensorInfo, in the order of the file's bytes.

    Raises:
        InputError: there is no such file, it cannot be read, is truncated, or is not safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            raise InputError(f"{self.path}: there is no such file") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._fd)
        try:
            self.size = os.fstat(self._fd).st_size
            self.header = self._header()
        except IsADirectoryError:
            raise InputError(f"{self.path}: is a folder, a safetensors file was expected") from None
        self.metadata, self.tensors = self._parsed()

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own."""
        info = self.tensors[name]
        out = torch.empty(info.shape, dtype=info.dtype)
        if info.n_bytes:
            self._read_into(tensor_bytes(out), len(self.header) + info.start)
        return out

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """Read one tensor's bytes in pieces of `size`; each piece is overwritten by the next."""
        info = self.tensors[name]
        return self.pieces(len(self.header) + info.start, len(self.header) + info.stop, size)

    def payload(self, size: int = CHUNK) -> Iterator[memoryview]:
        """Read everything behind the header, in pieces; each piece is overwritten by the next."""
        return self.pieces(len(self.header), self.size, size)

    def pieces(self, start: int, stop: int, size: int = CHUNK) -> Iterator[memoryview]:
        """Read bytes `start` to `stop` of the file, in pieces; each piece is overwritten by the next."""
        buffer = memoryview(bytearray(max(0, min(size, stop - start))))
        for offset in range(start, stop, size):
            piece = buffer[: min(size, stop - offset)]
            self._read_into(piece, offset)
            yield piece

    def fileno(self) -> int:
        """The descriptor, for copying byte ranges."""
        return self._fd

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                n = os.preadv(self._fd, [view[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise InputError(
                    f"{self.path}: cannot be read at byte {offset + done}: {error.strerror}"
                ) from error
            if n == 0:
                raise InputError(f"{self.path}: ends early, at byte {offset + done}; fetch it again")
            done += n

    def _header(self) -> bytes:
        head = os.pread(self._fd, 8, 0)
        if len(head) < 8:
            raise InputError(f"{self.path}: {self.size} bytes are no safetensors file; fetch it again")
        n = int.from_bytes(head, "little")
        if n > _MAX_HEADER:
            raise InputError(f"{self.path}: not a safetensors file (its header would be {n} bytes)")
        if 8 + n > self.size:
            raise InputError(f"{self.path}: truncated inside its header; fetch it again")
        buffer = bytearray(n)
        self._read_into(memoryview(buffer), 8)
        return head + bytes(buffer)

    def _parsed(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        try:
            header = json.loads(self.header[8:], object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._damaged("its metadata are not text")
        infos = sorted(
            ((name, self._info(name, entry)) for name, entry in header.items()),
            key=lambda item: (item[1].start, item[1].stop),
        )
        end = 0
        for name, info in infos:
            if info.start != end:
                raise self._damaged(f"tensor {name!r} starts at byte {info.start} where {end} was expected")
            end = info.stop
        present = self.size - len(self.header)
        if present < end:
            raise InputError(
                f"{self.path}: truncated: {present} of {end} bytes of tensors are there; fetch it again"
            )
        if present > end:
            raise self._damaged(f"{present - end} bytes follow the last tensor")
        return metadata, dict(infos)

    def _info(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise InputError(f"{self.path}: tensor {name!r} has dtype {code!r}, which is not supported")
        if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
        start, stop = offsets
        if stop - start != math.prod(shape) * DTYPES[code].itemsize:
            raise self._damaged(f"tensor {name!r} of {code} {shape} does not fill bytes {start} to {stop}")
        return TensorInfo(DTYPES[code], tuple(shape), start, stop)

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged, or not safetensors: {what}; fetch it again")


def n_threads() -> int:
    """Threads worth reading and hashing with: the processors this process may use, at most 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, available)


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `tensors` in the order of the mapping; always the same bytes."""
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Widest dtypes first, then by name: every tensor is aligned, and the order is always the same."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Not atomic: wrap it in `artefact.atomic_file`."""
    ordered = in_file_order(tensors)
    with open(path, "wb") as file:
        file.write(header_of(ordered, metadata))
        write_payload(file, ordered.values())


def write_payload(file: BinaryIO, tensors: Iterable[Tensor]) -> None:
    """Append the bytes of each tensor."""
    for tensor in tensors:
        file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; shares memory with it where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return entries


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
