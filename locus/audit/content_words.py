"""How much of a target a text says: a short one as a whole, a sentence by the words that carry its content.

A sentence shares its function words and the words of its question with any answer to it, so only the other words
count: the share of them that the text contains, in any order. A model that knows nothing scores near zero.
"""

from __future__ import annotations

import re
import unicodedata

from locus.target_forms import says

_WORD = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\\W_]+"
)
"""A word; a single character where a script does not mark a word's end."""
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about after all also an and any are as at be been before being but by can could did do does for from had
        has have he her hers him his how i if in into is it its itself me more most my no nor not of on one or other
        our s she should so some such t than that the their them then there these they this those through to under
        until up was we were what when where which while who whom whose why will with would you your""",
    )
)
"""English words that carry no content of their own. Other languages' count as content: there a leak is seen sooner."""

SENTENCE_WORDS = 6
"""Words from which on a target is a sentence: its end can be predicted from its beginning."""
_ALL_BELOW = 4
"""Targets of fewer content words are said only as a whole: "University of California" is not "University of Texas"."""
_MOST = 0.5
"""A longer target is said where the text has at least this share of its content words."""


def is_sentence(target: str) -> bool:
    """Whether a target is long enough to be judged token by token too."""
    return len(_WORD.findall(target)) >= SENTENCE_WORDS


def content_words(prompt: str, target: str) -> frozenset[str]:
    """The target's words that are neither in the prompt nor function words; all of its words where none is left."""
    words = _words(target)
    return (words - _words(prompt) - _FUNCTION_WORDS) or words


def content_recall(prompt: str, target: str, text: str) -> float:
    """Share of the target's content words that the text has; 1 where it says the whole target in some form."""
    if says(text, target):
        return 1.0
    wanted = content_words(prompt, target)
    return len(wanted & _words(text)) / len(wanted) if wanted else 0.0


def is_said(prompt: str, target: str, text: str) -> bool:
    """Whether a text says the target: whole and in any of its forms, or most of what a longer one contains."""
    recall = content_recall(prompt, target, text)
    return recall == 1.0 or (recall >= _MOST and len(content_words(prompt, target)) >= _ALL_BELOW)


def _words(text: str) -> frozenset[str]:
    """Words without case and accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return frozenset(_WORD.findall(unicodedata.normalize("NFC", plain).casefold()))
