"""Where a benchmark's sets are: files of a folder on the disk, or a dataset of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locus.errors import InputError
from locus.readers.hub import hub_records
from locus.readers.records import head, json_array, json_objects, missing, opened

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
HUB = "hf://"


@dataclass(frozen=True)
class BenchmarkFolder:
    """A folder of a benchmark's files, or hf://owner/dataset."""

    place: str

    @property
    def on_hub(self) -> bool:
        """Whether the sets come from the hub (its cache only, where HF_HUB_OFFLINE is set)."""
        return self.place.startswith(HUB)

    def has(self, name: str) -> bool:
        """Whether a set is there. Of a dataset on the hub this is only known once it is read."""
        return self.on_hub or self._file(name) is not None

    def read(self, name: str, limit: int | None, *needed: str) -> list[dict[str, Any]]:
        """The records of one set, each with the fields needed.

        Args:
            name: "verbmem/forget": the file verbmem/forget.json, or the hub's configuration verbmem with its split
                forget. Without a slash the split is train.
            limit: At most so many.
            needed: Fields every record must have.

        Raises:
            InputError: it is not there, not JSON, empty, or a record lacks a field.
        """
        if not self.on_hub:
            return read_records(self._file(name) or Path(self.place) / f"{name}.json", limit, *needed)
        config, _, split = name.partition("/")
        place = f"{self.place.rstrip('/')}/{config}#{split or 'train'}"
        return _complete(place, (record.fields for record in hub_records(place)), limit, needed)

    def _file(self, name: str) -> Path | None:
        paths = (Path(self.place) / f"{name}{ending}" for ending in ENDINGS)
        return next((path for path in paths if path.is_file()), None)


def read_records(path: Path, limit: int | None, *needed: str) -> list[dict[str, Any]]:
    """JSON records of a file, one array or one object a line, gzipped or not, each with the fields needed.

    A bare text stands for a record with that text.

    Raises:
        InputError: no such file, not JSON, empty, or a record without one of the fields.
    """
    if not path.is_file():
        raise InputError(f"{missing(path)}; the suite needs it")
    with opened(path) as stream:
        start = head(stream)
        if not start:
            raise InputError(f"{path}: an empty suite; nothing can be measured with it")
        read = json_array if start.startswith("[") else json_objects
        return _complete(str(path), (record.fields for record in read(stream, str(path))), limit, needed)


def _complete(
    place: str, records: Iterator[Any], limit: int | None, needed: tuple[str, ...]
) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for number, record in enumerate(records, 1):
        if limit is not None and len(out) == limit:
            break
        record = {"text": record} if isinstance(record, str) else record
        if absent := [key for key in needed if not isinstance(record, dict) or key not in record]:
            raise InputError(
                f"{place}, record {number}: no field {absent[0]!r}; is this the right benchmark's file?"
            )
        out.append(record)
    if not out:
        raise InputError(f"{place}: an empty suite; nothing can be measured with it")
    return out
