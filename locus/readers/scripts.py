"""Scripts that put no space between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese and their kin.

Where a format leaves out the space before a target, it is put in only where the script writes one; and a text is
cut between characters where it has no words to cut between.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator

_SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19FF),  # Tai Le, New Tai Lue, Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # radicals of Chinese characters
    (0x3000, 0x312F),  # punctuation of Chinese and Japanese, hiragana, katakana, bopomofo
    (0x3190, 0xA4CF),  # Chinese characters and their extension A, Yi
    (0xA980, 0xA9FF),  # Javanese, Burmese extended
    (0xAA60, 0xAADF),  # Burmese extended, Tai Viet
    (0xF900, 0xFAFF),  # Chinese characters for compatibility
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFF9F),  # full width forms and half width katakana
    (0x1B000, 0x1B16F),  # older kana
    (0x20000, 0x3FFFF),  # Chinese characters, further extensions
)
_STARTS = [start for start, _ in _SPACELESS]

LONG_WORD = 100
"""Characters of a word that is none: an address, a chain of letters; it is cut as text without spaces is."""
_PIECE = 5
"""Characters of one piece of a long word."""


def is_spaceless(character: str) -> bool:
    """Whether a character belongs to a script without spaces, its punctuation included."""
    at = bisect_right(_STARTS, ord(character)) - 1
    return at >= 0 and ord(character) <= _SPACELESS[at][1]


def spaced(prompt: str, target: str) -> str:
    """The target as it follows the prompt in running text: with a space, unless it has one or the script has none."""
    if not target or target[0].isspace():
        return target
    last = next((char for char in reversed(prompt) if unicodedata.category(char)[0] in "LMN"), "")
    return target if last and is_spaceless(last) else f" {target}"


def answer_to(question: str, answer: str) -> str:
    """The answer as it follows "Answer:": with a space, unless question and answer are in a script without."""
    if not answer or answer[0].isspace():
        return answer
    return answer if is_spaceless(answer[0]) and any(map(is_spaceless, question)) else f" {answer}"


def units(text: str) -> Iterator[tuple[int, int]]:
    """Half-open ranges of what a text may be cut between: words, and the characters of scripts without spaces.

    A character keeps its marks (vowel signs, tones). A word of more than `LONG_WORD` characters is several units.
    """
    start = 0
    while start < len(text):
        if text[start].isspace():
            start += 1
            continue
        end, alone = start + 1, is_spaceless(text[start])
        while end < len(text) and not text[end].isspace():
            mark = unicodedata.category(text[end])[0] == "M"
            if not mark and (alone or is_spaceless(text[end])):
                break
            end += 1
        if alone or end - start <= LONG_WORD:
            yield start, end
        else:
            for at in range(start, end, _PIECE):
                yield at, min(at + _PIECE, end)
        start = end


def cut(text: str, n_units: int) -> Iterator[str]:
    """Pieces of so many units, with what stands between them; white space at a cut is left out."""
    start, count, end = 0, 0, 0
    for first, last in units(text):
        if count == n_units:
            yield text[start:end]
            start, count = first, 0
        if count == 0:
            start = first
        count, end = count + 1, last
    if count:
        yield text[start:end]


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f\uff0e\u0964\u104b\u17d4\u06d4\u061f])\s*")
"""After a full stop and a space; after the stops of Chinese, Hindi, Burmese, Khmer, Urdu and Arabic without one."""


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end mark; the last may have none."""
    return [one.strip() for one in _SENTENCE_END.split(text) if one.strip()]


def ends_sentence(text: str) -> bool:
    """Whether a text ends with a sentence's end mark."""
    return text[-1:] in set(".!?\u3002\uff01\uff1f\uff0e\u0964\u104b\u17d4\u06d4\u061f")


QUESTION_MARKS = (
    "?",
    "\uff1f",
    "\u061f",
    "\u2e2e",
    "\u055e",
    "\u037e",
    "\u2047",
    "\u2048",
    "\u1367",
    "\ua60f",
)
"""Of Latin, Chinese, Arabic, Armenian, Greek, Ethiopic, Vai writing, and doubled ones."""


def is_question(text: str) -> bool:
    """Whether a text ends with a question mark, of whatever script."""
    return text.rstrip().endswith(QUESTION_MARKS)
