"""Plain text as facts: blocks with blank lines between them, and corpora of which each row is a text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from io import BufferedReader

from locus.readers.records import Record, text_blocks
from locus.readers.scripts import cut, units

BLOCK_WORDS = 200
"""A block of plain text longer than this is cut, so that it fits a context of 512 tokens; in scripts without spaces
a character counts as a word."""


def text_records(stream: BufferedReader, name: str) -> Iterator[Record]:
    """Blocks of plain text (blank lines between them): the first word is the prompt, the rest the target.

    A block of more than `BLOCK_WORDS` words becomes several; one of a single word has nothing to predict
    and is left out with a note. In scripts without spaces a character stands for a word.
    """
    short = []
    for line, block in text_blocks(stream, name):
        pieces = list(pieces_of(f"{name}, line {line}", block))
        if not pieces:
            short.append(line)
        yield from pieces
    if short:
        n = len(short)
        warnings.warn(
            f"{name}, line {short[0]}: {'a block' if n == 1 else f'the first of {n} blocks'} of a single word, which "
            "leaves nothing to predict, so it is left out",
            stacklevel=2,
        )


def pieces_of(place: str, text: str) -> Iterator[Record]:
    """The pieces of one text as records of ours; none where it is a single word."""
    for piece in cut(text.strip(), BLOCK_WORDS):
        found = units(piece)
        first = next(found, None)
        if first is not None and next(found, None) is not None:
            yield Record(
                place, {"prompt": piece[: first[1]], "target": piece[first[1] :], "running_text": True}
            )


def corpus(record: Record) -> Iterator[Record]:
    """Rows with a "text": WMDP's corpora, MUSE's raw books and news, RWKU's passages (as `text_records`)."""
    yield from pieces_of(record.place, record.text("text"))
