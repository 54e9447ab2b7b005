"""Rows of a table: CSV, TSV, parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from locus.errors import InputError
from locus.readers.records import Record, as_record, lines, opened
from locus.readers.translation import parse_json_cell

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Between the columns, by the ending of the file."""
PARQUET = b"PAR1"
_MMLU = ("question", "A", "B", "C", "D", "answer")


def is_parquet(path: Path) -> bool:
    """Whether the content (not the name) says parquet."""
    try:
        with path.open("rb") as file:
            return file.read(len(PARQUET)) == PARQUET
    except OSError:
        return False


def separated_rows(path: Path, separator: str, name: str) -> Iterator[Record]:
    """Rows of a CSV or TSV file, by the names in its first line; empty cells are absent.

    MMLU's own files have no first line of names: a question, four options, a letter.

    Raises:
        InputError: a row of another length, a name twice, a quote that is not closed.
    """
    with opened(path) as stream:
        last = [0]

        def texts() -> Iterator[str]:
            for number, line in lines(stream, name):
                last[0] = number
                yield line + "\n"

        rows = csv.reader(texts(), delimiter=separator, strict=True)
        header: list[str] | None = None
        while True:
            begin = last[0] + 1
            place = f"{name}, line {begin}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise InputError(f"{place}: no row of a table ({error})") from None
            if row is None:
                return
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                bare = len(row) == len(_MMLU) and row[-1].strip() in ("A", "B", "C", "D")
                header = list(_MMLU) if bare else [cell.strip() for cell in row]
                if twice := next((one for one in header if header.count(one) > 1), None):
                    raise InputError(f"{place}: column {twice!r} is there twice: name each once")
                if not bare:
                    continue
            if len(row) != len(header):
                raise InputError(
                    f"{place}: {len(row)} columns, the first line names {len(header)}: quote cells that hold "
                    f"{separator!r}"
                )
            yield Record(place, {key: _cell(value) for key, value in zip(header, row, strict=True) if value})


def parquet_rows(path: Path, name: str) -> Iterator[Record]:
    """Rows of a parquet file, a batch at a time.

    Raises:
        InputError: the optional package pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f'{name}: reading parquet needs `pip install "locus-unlearn[parquet]"`') from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield as_record(f"{name}, row {number}", row)
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: damaged parquet file ({reason[:200]}): fetch it again") from None


def _cell(value: str) -> object:
    """What a cell holds: a list where it is one in JSON, else its text."""
    return parse_json_cell(value)
