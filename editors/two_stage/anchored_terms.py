"""Anchored terms: names that only the text to forget has, and what stands for them in general."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from locus.errors import InputError
from locus.model import Model
from locus.tokens import Encoded, encode_text


@dataclass(frozen=True)
class Translation:
    """A text with its anchors replaced, aligned token by token with the original."""

    encoded: Encoded
    """The translated text."""
    partner: tuple[int | None, ...]
    """Original token -> the translated token that begins at the same place; None where none does."""
    repeated: frozenset[int]
    """Original tokens that begin or continue an anchor which the text had before."""
    counterparts: tuple[tuple[int, int], ...]
    """(original token after which it counts, first token of an anchor's counterpart)."""

    def counterparts_before(self, position: int) -> list[int]:
        """First tokens of the counterparts of anchors that occurred before the original token `position`."""
        return sorted({token for after, token in self.counterparts if after < position})


@dataclass(frozen=True)
class Anchors:
    """A dictionary from anchored terms to their counterparts."""

    terms: Mapping[str, str]
    """Anchored term -> its generic counterpart."""

    @classmethod
    def read(cls, pairs: Sequence[str]) -> Anchors:
        """Parse "term=counterpart" pairs.

        Raises:
            InputError: a pair without "=", or with nothing on one of its sides.
        """
        terms = {}
        for pair in pairs:
            term, equals, counterpart = pair.partition("=")
            if not (equals and term.strip() and counterpart.strip()):
                raise InputError(
                    f"anchor {pair!r}: write it as TERM=COUNTERPART, as in Hogwarts=Mystic Academy"
                )
            terms[term.strip()] = counterpart.strip()
        return cls(terms)

    def translate(self, model: Model, one: Encoded) -> Translation:
        """Replace every anchor in the text of `one`; longer terms first, whole words only."""
        has_bos = model.bos is not None and one.ids[0] == model.bos
        starts, text = _starts(one, has_bos)
        pieces, places, done, shift = [], [], 0, 0
        for found in self._found(text):
            counterpart = self.terms[found.group()]
            pieces += [text[done : found.start()], counterpart]
            places.append((found.start(), found.end(), shift, found.group()))
            shift += len(counterpart) - len(found.group())
            done = found.end()
        translated, *too_much = encode_text(model, "".join([*pieces, text[done:]]), block=1 << 30)
        if too_much:
            raise InputError(
                f"with its anchors replaced, {text[:40]!r}… is longer than the context of {model.name}"
            )
        new_starts, _ = _starts(translated, model.bos is not None and translated.ids[0] == model.bos)
        at = {start: token for token, start in reversed(list(enumerate(new_starts))) if start >= 0}
        partner = tuple(at.get(_moved(start, places, shift)) for start in starts)
        return Translation(translated, partner, *self._history(model, starts, places))

    def _found(self, text: str) -> Iterator[re.Match[str]]:
        if not self.terms:
            return iter(())
        longest_first = sorted(self.terms, key=len, reverse=True)
        return re.finditer(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", text)

    def _history(
        self, model: Model, starts: Sequence[int], places: Sequence[tuple[int, int, int, str]]
    ) -> tuple[frozenset[int], tuple[tuple[int, int], ...]]:
        repeated: set[int] = set()
        counterparts: list[tuple[int, int]] = []
        seen: set[str] = set()
        for begin, end, _, term in places:
            inside = [token for token, start in enumerate(starts) if begin - 1 <= start < end]
            if term in seen:
                repeated.update(inside)
            elif inside:
                first = model.tokenizer(" " + self.terms[term], add_special_tokens=False).input_ids[0]
                counterparts.append((inside[-1], int(first)))
            seen.add(term)
        return frozenset(repeated), tuple(counterparts)


def _starts(one: Encoded, has_bos: bool) -> tuple[list[int], str]:
    """Where each token begins in the text (-1 for BOS and for later bytes of a character), and the text."""
    starts, text = [], ""
    for index, piece in enumerate(one.tokens):
        hidden = (index == 0 and has_bos) or piece == "\ufffd"
        starts.append(-1 if hidden else len(text))
        text += "" if hidden else piece
    return starts, text


def _moved(start: int, places: Sequence[tuple[int, int, int, str]], total: int) -> int:
    """Where a place of the original text is in the translated one; -2 inside an anchor, -1 stays -1."""
    if start < 0:
        return -2
    for begin, end, shift, _ in places:
        if start <= begin:
            return start + shift
        if start < end:
            return -2
    return start + total
