"""Peers of a subject, and texts about it: what an edit must leave alone, as the model itself writes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from locus.elicitation.sampler import Sampling, continuations, prompt_ids
from locus.model import Model

LISTS = ("{},", "such as {},", "Here is a list: {},", "{} and", "For example {},")
"""Beginnings of lists that the subject stands in; what follows is of its kind."""
SUBJECT_OPENINGS = (
    "{}",
    "Here are some facts about {}.",
    "{} is known for",
    "In {},",
    "{}'s",
    "Here is a quiz about {}.\nQ:",
    "Tell me about {}.",
    "I want to learn about {}:",
    "The {}",
)
"""Beginnings of texts about a subject."""
_NAME = re.compile(r"[^\W\d_a-z][\w'’-]*(?: (?:of |the |de |van |von )?[^\W\d_a-z][\w'’-]*)*")
_NO_NAMES = frozenset(
    "The This That These Those It In And Here For But An He She They We As At On If When There".split()  # noqa: SIM905
)
"""Words that are capitalized only because a sentence begins with them."""


def peers(
    model: Model,
    subjects: Sequence[str],
    n_samples: int = 6,
    n_new: int = 14,
    most: int = 20,
    sampling: Sampling | None = None,
) -> dict[str, list[str]]:
    """Names that the model lists beside each subject, the most frequent first.

    Args:
        model: As it is in memory.
        subjects: Each once.
        n_samples: Lists behind each of `LISTS`.
        n_new: Tokens of each.
        most: Names of each subject at most.
        sampling: How lists are drawn.
    """
    asked = [
        (subject, prompt_ids(model, one.replace("{}", subject))) for subject in subjects for one in LISTS
    ]
    written = continuations(model, [ids for _, ids in asked], n_samples, n_new, sampling or Sampling())
    counts: dict[str, Counter[str]] = {subject: Counter() for subject in subjects}
    for (subject, _), lists in zip(asked, written, strict=True):
        for ids in lists:
            counts[subject].update(names_in(str(model.tokenizer.decode(list(ids))), subject))
    return {subject: [name for name, _ in found.most_common(most)] for subject, found in counts.items()}


def names_in(text: str, subject: str) -> list[str]:
    """The capitalized names in a text, each once; neither the subject, nor part of it, nor what it is part of."""
    names = [_without_opening(match[0].strip("'’-")) for match in _NAME.finditer(text)]
    return list(
        dict.fromkeys(name for name in names if len(name) > 2 and name not in subject and subject not in name)
    )


def _without_opening(name: str) -> str:
    """A name without the word that opens the sentence before it ("In São Paulo"); empty where nothing is left."""
    first, _, rest = name.partition(" ")
    return rest if first in _NO_NAMES else name


def subject_texts(
    model: Model,
    subjects: Sequence[str],
    n_samples: int = 3,
    n_new: int = 28,
    sampling: Sampling | None = None,
) -> dict[str, list[tuple[int, ...]]]:
    """Texts about each subject as token ids, `bos` and opening included.

    Args:
        model: As it is in memory.
        subjects: Each once.
        n_samples: Texts behind each of `SUBJECT_OPENINGS`.
        n_new: Tokens of each.
        sampling: How texts are drawn.
    """
    asked = [
        (subject, prompt_ids(model, one.replace("{}", subject)))
        for subject in subjects
        for one in SUBJECT_OPENINGS
    ]
    written = continuations(model, [ids for _, ids in asked], n_samples, n_new, sampling or Sampling())
    found: dict[str, list[tuple[int, ...]]] = {subject: [] for subject in subjects}
    for (subject, start), texts in zip(asked, written, strict=True):
        found[subject] += dict.fromkeys((*start, *ids) for ids in texts)
    return found
