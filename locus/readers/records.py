"""Raw records out of a file: gunzipped, decoded, one at a time, each with the place it came from.

Nothing here knows what a fact is. Memory is bounded by one record, whatever the size of the file, and
every error names the file and the line.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from locus.errors import InputError

MAX_RECORD = 64 * 2**20
"""Bytes a line, or characters a record of an array, may have; a longer one is refused without being read."""

_CHUNK = 2**16
_NOT_JSON = "give one JSON object a line, or one JSON array of objects"
LFS = b"version https://git-lfs"
"""How a pointer begins that Git LFS leaves where a large file is not fetched."""


class Record(NamedTuple):
    """One JSON object of a file."""

    place: str
    """`"facts.jsonl, line 17"`: where the object begins."""
    fields: dict[str, object]

    def text(self, name: str) -> str:
        """The string in a field that must be there."""
        value = self.fields.get(name)
        if value is None:
            raise InputError(f'{self.place}: no "{name}"')
        if not isinstance(value, str):
            raise InputError(f'{self.place}: "{name}" must be text, not {_kind(value)}')
        return value

    def optional_text(self, name: str) -> str | None:
        """The string in a field, None when the field is absent or null."""
        return None if self.fields.get(name) is None else self.text(name)

    def truth(self, name: str) -> bool:
        """True or false in a field, or a table's word for it; false when the field is absent or null."""
        value = self.fields.get(name)
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower(), value)
        if not isinstance(value, bool | None):
            raise InputError(f'{self.place}: "{name}" must be true or false')
        return bool(value)

    def texts(self, name: str) -> list[str]:
        """The strings of a field that holds one or a list of them; none when it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return []
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in found):
            raise InputError(f'{self.place}: "{name}" must be a list of texts')
        return list(found)

    def object(self, name: str) -> Record:
        """The object in a field that must be there."""
        value = self.fields.get(name)
        if not isinstance(value, dict):
            raise InputError(f'{self.place}: "{name}" must be an object, not {_kind(value)}')
        return Record(f"{self.place}, {name}", value)

    def objects(self, name: str) -> list[Record]:
        """The objects of a list; none when it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise InputError(f'{self.place}: "{name}" must be a list of objects')
        return [Record(f"{self.place}, {name} {n}", one) for n, one in enumerate(value, 1)]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open for reading in bytes, gunzipping when the content (not the name) says gzip.

    Raises:
        InputError: the file is missing (near names are told), a folder, unreadable, or a damaged gzip file.
    """
    try:
        with path.open("rb") as raw:
            stream = raw
            if raw.peek(2)[:2] == b"\x1f\x8b":
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
            if stream.peek(len(LFS)).startswith(LFS):
                raise InputError(
                    f"{path}: a Git LFS pointer, not the file itself: fetch it with git lfs pull"
                )
            yield stream
    except FileNotFoundError:
        raise InputError(missing(path)) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder: name a file in it") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}): fetch or compress it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def missing(path: Path, known: Iterable[str] = ()) -> str:
    """The message for a file that is not there, with the nearest of its neighbours and of `known` names."""
    if not path.parent.is_dir():
        return f"{path}: no such file (folder {path.parent} does not exist)"
    names = [str(beside) for beside in path.parent.iterdir() if beside.name != path.name]
    near = difflib.get_close_matches(str(path), [*names, *known], n=3, cutoff=0.7)
    return f"{path}: no such file" + (f": did you mean {' or '.join(near)}?" if near else "")


def head(stream: io.BufferedReader) -> str:
    """The beginning of the text, without byte order mark and leading white space; consumes nothing."""
    return stream.peek(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:256].decode("utf-8", "replace")


def lines(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text, without its line end, of every line.

    Raises:
        InputError: a line that is not UTF-8 or is longer than `MAX_RECORD`.
    """
    number = 0
    while raw := stream.readline(MAX_RECORD + 1):
        number += 1
        if len(raw) > MAX_RECORD:
            raise InputError(
                f"{name}, line {number}: longer than {MAX_RECORD >> 20} MiB, which no fact is: break the line"
            )
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(_not_utf8(f"{name}, line {number}", raw, error.start)) from None


def _not_utf8(place: str, raw: bytes, at: int) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"{place}: UTF-16, not UTF-8: save the file as UTF-8"
    return f"{place}: not UTF-8 (byte 0x{raw[at]:02x} at column {at + 1}): save the file as UTF-8"


def json_lines(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """The objects of a JSON Lines file; blank lines are skipped."""
    for number, line in lines(stream, name):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            value = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            shown = f"{line[:40]}…" if len(line) > 40 else line
            raise InputError(
                f"{place}: not JSON ({error.msg} at column {error.colno}) in {shown!r}: {_NOT_JSON}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not usable JSON ({error})") from None
        yield as_record(place, value)


def starts_over_lines(stream: io.BufferedReader) -> bool:
    """Whether the first object goes on past its first line, as a pretty-printed one does; consumes nothing."""
    start = stream.peek(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()
    first, end, rest = start.partition(b"\n")
    if not end or not first.startswith(b"{"):
        return False
    try:
        _DECODER.decode(first.decode("utf-8"))
    except json.JSONDecodeError as error:
        # A line that could go on: what is wrong with it is that it ends.
        return error.pos >= len(error.doc.rstrip()) and not rest.lstrip().startswith(b"{")
    except (ValueError, RecursionError):
        return False
    return False


def json_objects(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """Objects one after the other, each over as many lines as it likes."""
    text = _Window(stream, name)
    while text.peek():
        yield text.record()


def json_array(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """The objects of one JSON array, read as they are asked for; a bare text stands for {"text": …}."""
    text = _Window(stream, name)
    text.expect("[")
    if text.peek() == "]":
        text.expect("]")
    else:
        separator = ","
        while separator == ",":
            yield text.record()
            separator = text.expect(",", "]")
    if rest := text.peek():
        raise InputError(f"{text.place}: {rest!r} after the array's end: keep one array a file")


class _Window:
    """The part of a JSON array that has been read and not yet used."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._line, self._n_records = "", 1, 0

    @property
    def place(self) -> str:
        return f"{self._name}, line {self._line}"

    def _grow(self, n: int) -> bool:
        raw = self._stream.read(n)
        try:
            self._text += self._decode.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + raw[: error.start].count(b"\n")
            bad = error.object[error.start]
            raise InputError(
                f"{self._name}, line {line}: not UTF-8 (byte 0x{bad:02x}): save the file as UTF-8"
            ) from None
        return bool(raw)

    def _take(self, n: int) -> None:
        self._line += self._text.count("\n", 0, n)
        self._text = self._text[n:]

    def peek(self) -> str:
        """The next character that is not white space, or `""` at the end of the file."""
        while True:
            self._take(len(self._text) - len(self._text.lstrip()))
            if self._text or not self._grow(_CHUNK):
                return self._text[:1]

    def expect(self, *marks: str) -> str:
        found = self.peek()
        if found not in marks or not found:
            wanted = " or ".join(repr(mark) for mark in marks)
            if not found:
                raise InputError(f"{self.place}: the array is not closed: was the file cut off?")
            raise InputError(f"{self.place}: not JSON ({found!r} where {wanted} should be)")
        self._take(1)
        return found

    def record(self) -> Record:
        if (found := self.peek()) not in ("{", '"'):
            raise InputError(f"{self.place}: {found!r} where an object should begin: {_NOT_JSON}")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text)
            except json.JSONDecodeError as error:
                # Cut off by the window's edge, or wrong: more text tells which.
                if len(self._text) <= MAX_RECORD and self._grow(max(_CHUNK, len(self._text))):
                    continue
                line = self._line + self._text.count("\n", 0, error.pos)
                long = f", or longer than {MAX_RECORD >> 20} MiB" if len(self._text) > MAX_RECORD else ""
                raise InputError(f"{self._name}, line {line}: not JSON ({error.msg}){long}") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.place}: not usable JSON ({error})") from None
            self._n_records += 1
            value = {"text": value} if isinstance(value, str) else value
            record = as_record(f"{self._name}, record {self._n_records} (line {self._line})", value)
            self._take(end)
            return record


def text_blocks(stream: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    """First line's number and text of every block: lines between blank lines, line ends inside kept."""
    start, block = 0, list[str]()
    for number, line in lines(stream, name):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield start, "\n".join(block).strip()
            block = []
    if block:
        yield start, "\n".join(block).strip()


def as_record(place: str, value: object) -> Record:
    """An object as a record.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, dict):
        raise InputError(f"{place}: {_kind(value)}, not an object: {_NOT_JSON}")
    return Record(place, value)


def _kind(value: object) -> str:
    kinds = {str: "a text", bool: "a truth value", list: "a list", dict: "an object", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'field "{twice}" is given twice')
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
