"""The forget facts in other words: a fact forgotten in one wording is often still answered in another.

Rewordings are made from the fact alone, without a language model: a context prefix before its prompt (as ROME samples
prefixes; Meng et al. 2022, arXiv:2202.05262), and its subject in a short frame. A fact's own `paraphrases` are never
used: they are for the audit only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from locus.errors import InputError
from locus.fact import Fact
from locus.model import Model
from locus.tokens import Encoded, encode

CONTEXT_PREFIXES = (
    "As we know, ",
    "Note: ",
    "In the report we read: ",
    "However, ",
    "The teacher said: ",
    "Yesterday. ",
)
"""Context prefixes: each is written before a prompt."""
FRAMES = ("{}:", "{} -", "About {}:", "When I hear {}, I think of", "{}, in short:", "{}? The answer is")
"""Frames around a subject, in place of the prompt."""


def rewordings(fact: Fact) -> list[Fact]:
    """The fact after every context prefix and, where it has a subject, in every frame; `subject` is None in all."""
    prompts = [prefix + fact.prompt for prefix in CONTEXT_PREFIXES]
    if fact.subject is not None:
        prompts += [frame.format(fact.subject) for frame in FRAMES]
    return [
        dataclasses.replace(
            fact,
            id=f"{fact.id[:100]} reworded {number}",
            prompt=prompt,
            subject=None,
            subject_start=None,
            paraphrases=(),
            neighbours=(),
        )
        for number, prompt in enumerate(prompts, 1)
    ]


def encoded_rewordings(model: Model, facts: Sequence[Fact]) -> tuple[list[Fact], list[Encoded]]:
    """All rewordings of all facts, and their tokens; those whose target does not begin at a token are left out."""
    reworded: list[Fact] = []
    encoded: list[Encoded] = []
    for fact in (other for one in facts for other in rewordings(one)):
        try:
            encoded.append(encode(model, fact))
        except InputError:
            continue
        reworded.append(fact)
    return reworded, encoded
