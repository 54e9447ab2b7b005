"""What the hub's library raises, in one line with the list to choose from."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from locus.errors import InputError
from locus.fact import read_facts


class DatasetGenerationError(Exception):
    """As the library names it."""


class DatasetGenerationCastError(DatasetGenerationError):
    """As the library names it."""


def _library(monkeypatch: pytest.MonkeyPatch, error: Exception, after: int | None = None) -> None:
    """A library whose `load_dataset` raises, or whose rows do after so many."""

    def load_dataset(path, config, split, streaming):
        def rows():
            for number in range(after or 0):
                yield {"question": f"Who is {number}?", "answer": "Ann"}
            raise error

        if after is None:
            raise error
        return rows()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


CONFIGS = (
    "Config name is missing.\nPlease pick one among the available configs: ['forget01', 'retain99']\nExample of usage:"
    "\n\t`load_dataset('x', 'forget01')`"
)


@pytest.mark.parametrize("after", [None, 0, 2])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "is a script, which is not run",
        ),
        (ValueError(CONFIGS), r"\['forget01', 'retain99'\]: give one as hf://owner/dataset/CONFIG"),
        (
            ValueError("BuilderConfig 'a' not found. Available: ['b', 'c']"),
            r"BuilderConfig 'a' not found\. Available: \['b', 'c'\]",
        ),
        (ValueError("Unknown split 'x'. Should be one of ['train']."), r"Should be one of \['train'\]"),
        (DatasetGenerationCastError("columns (a, b) differ\nmore"), r"columns \(a, b\) differ"),
        (KeyError("nothing"), "nothing"),
        (TypeError(), "TypeError"),
    ],
)
def test_any_error_is_one_line(error, said, after, monkeypatch):
    _library(monkeypatch, error, after)
    with pytest.raises(InputError, match=said) as caught:
        read_facts("hf://owner/set")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("hf://owner/set: ")


def test_a_cause_says_more_than_its_wrapper(monkeypatch):
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("JSON parse error: Missing a closing quotation mark in row 3")
    _library(monkeypatch, error, 1)
    with pytest.raises(InputError, match="Missing a closing quotation mark in row 3"):
        read_facts("hf://owner/set")
