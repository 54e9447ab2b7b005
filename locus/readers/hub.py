"""Rows of a dataset of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from locus.errors import InputError
from locus.readers.records import Record, as_record


def hub_records(name: str) -> Iterator[Record]:
    """Rows of a dataset of the Hugging Face hub: `hf://owner/name[/config][#split]`, split train.

    Streamed, or taken from the local cache alone where HF_HUB_OFFLINE is set.

    Raises:
        InputError: the optional package `datasets` is not installed, or the dataset cannot be found or read: one
            line, with the configurations or splits to choose from.
    """
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise InputError(f'{name}: reading the hub needs `pip install "locus-unlearn[hub]"`') from None
    path, _, split = name.removeprefix("hf://").partition("#")
    owner, _, rest = path.partition("/")
    dataset, _, config = rest.partition("/")
    if not owner or not dataset:
        raise InputError(f"{name}: name it as hf://owner/dataset, hf://owner/dataset/config or …#split")
    offline = constants.HF_HUB_OFFLINE
    rows = _rows(datasets, f"{owner}/{dataset}", config, split, name, offline)
    number = 0
    while True:
        try:  # what the library raises for bad files has no common ancestor but Exception
            row = next(rows, None)
        except Exception as error:
            raise InputError(_said(name, error, offline)) from None
        if row is None:
            return
        number += 1
        yield as_record(f"{name}, row {number}", dict(row))


def _rows(datasets: Any, path: str, config: str, split: str, name: str, offline: bool) -> Iterator[Any]:
    try:
        return iter(
            datasets.load_dataset(path, config or None, split=split or "train", streaming=not offline)
        )
    except Exception as error:
        raise InputError(_said(name, error, offline)) from None


def _said(name: str, error: Exception, offline: bool) -> str:
    """What the library says, in one line: its first line, and the list to choose from that it ends with."""
    text = str(error) or type(error).__name__
    cause = error.__cause__ or error.__context__
    if type(error).__name__ == "DatasetGenerationError" and cause is not None:
        text = str(cause) or text
    if "scripts are no longer supported" in text or "loading script" in text or "trust_remote_code" in text:
        return (
            f"{name}: the data set is a script, which is not run; download it and give a file of it, or the parquet "
            "files that the hub converts it to (branch refs/convert/parquet)"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    choice = next((found[0] for line in lines if (found := re.search(r"\[[^\[\]]*\]", line))), "")
    reason = lines[0][:400]
    if "config" in text.lower() and choice and choice not in reason:
        reason = f"{reason} {choice}"
    if "Config name is missing" in text:
        reason = (
            f"it has several configurations, {choice or 'none named'}: give one as hf://owner/dataset/CONFIG"
        )
    where = " (HF_HUB_OFFLINE is set, so only the local cache was asked)" if offline else ""
    return f"{name}: the hub did not give it{where}: {reason}"
