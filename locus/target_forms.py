"""Forms of a target: the same answer in another case, with or without its space, in the plural.

A model from which " Pound" was taken may still answer " pound" or " pounds", which is the same answer. What counts
as the same is defined here once, for editors (which tokens must lose their probability) and for judges (whether a
text says it).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from locus.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = ":"
"""What stands before a form when it is tokenized: a SentencePiece tokenizer puts a space before a text's start."""
_ACCENTS = re.compile("[\u0300-\u036f]")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
)
"""Thai, Lao, Burmese, Khmer, Japanese, Chinese, Korean: a word's end is not marked there, or a particle follows."""
_ENDING = "(?:['’]s|s|es)?"
"""Plural and possessive, in English."""


@dataclass(frozen=True)
class TargetForm:
    """One way of writing a target."""

    text: str
    """With its leading space, where it has one."""
    ids: tuple[int, ...]
    """Its tokens, as they follow other text."""


def spellings(target: str) -> tuple[str, ...]:
    """The target as given, then with and without a leading space, in lower, upper and title case.

    Title case raises the first letter of the first word only: a target's other words keep theirs.
    """
    word = target.strip()
    if not word:
        raise InputError(f"target {target!r}: write out what must follow")
    cases = (word, word.lower(), word[:1].upper() + word[1:], word.upper())
    return tuple(dict.fromkeys((target, *(space + case for case in cases for space in (" ", "")))))


def forms(tokenizer: PreTrainedTokenizerBase, target: str) -> tuple[TargetForm, ...]:
    """The `spellings` of a target as tokens, the target's own first; then the plurals that are one token.

    A spelling that the tokenizer does not know, or whose first token would reach into the text before it, is left
    out. So is a plural of several tokens: it begins as its singular does, or is no word that the model knows.

    Raises:
        InputError: the target is empty, or none of its spellings can be tokenized.
    """
    unknown = tokenizer.unk_token_id
    found: dict[tuple[int, ...], TargetForm] = {}
    for text in spellings(target):
        ids = _ids(tokenizer, text)
        if ids and (unknown is None or unknown not in ids):
            found.setdefault(ids, TargetForm(text, ids))
    for plural in [one.text + ending for one in tuple(found.values()) for ending in ("s", "es")]:
        if len(ids := _ids(tokenizer, plural)) == 1 and ids != (unknown,):
            found.setdefault(ids, TargetForm(plural, ids))
    if not found:
        raise InputError(f"target {target!r}: the tokenizer does not know it in any spelling")
    return tuple(found.values())


def first_tokens(tokenizer: PreTrainedTokenizerBase, target: str) -> tuple[int, ...]:
    """The tokens that a form of the target may begin with; one that holds no letter or digit is none of them.

    The sum of their probabilities is an upper bound of the probability that some form of the target follows.

    Raises:
        InputError: as `forms`.
    """
    every = forms(tokenizer, target)
    firsts = dict.fromkeys(one.ids[0] for one in every)
    spoken = [one for one in firsts if any(map(str.isalnum, str(tokenizer.decode([one]))))]
    return tuple(spoken or firsts)


def says(text: str, target: str) -> bool:
    """Whether a text says the target: as whole words, in any case, accents aside, in the plural too.

    In scripts that do not mark a word's end (Chinese, Japanese, Thai, …) it may be part of a longer word.
    """
    wanted = _folded(target).strip()
    if not wanted:
        raise InputError(f"target {target!r}: say what must follow")
    left = r"(?<!\w)" if wanted[0].isalnum() and not _UNSPACED.match(wanted[0]) else ""
    right = rf"{_ENDING}(?!\w)" if wanted[-1].isalnum() and not _UNSPACED.match(wanted[-1]) else ""
    pattern = left + r"\s+".join(map(re.escape, wanted.split())) + right
    return re.search(pattern, _folded(text)) is not None


def _folded(text: str) -> str:
    """Case, width and accents taken away."""
    plain = unicodedata.normalize("NFKD", text)
    return unicodedata.normalize("NFC", _ACCENTS.sub("", plain)).casefold()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of a text that follows other text; none where its first token reaches into that."""
    whole = tokenizer(_ANCHOR + text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = list(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
    if any(start < len(_ANCHOR) < end for _, (start, end) in pairs):
        return ()
    return tuple(id for id, (start, end) in pairs if start >= len(_ANCHOR) and end > start)
