"""The forget facts asked in other words: what one wording forgets, another often still answers.

Made without a language model, from the fact alone: its prompt behind the opening of a sentence (as ROME samples
prefixes; Meng et al. 2022, arXiv:2202.05262), and its subject alone in a short frame. They know nothing of a fact's
own `paraphrases`, which only judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from locus.errors import InputError
from locus.fact import Fact
from locus.model import Model
from locus.tokens import Encoded, encode

OPENINGS = (
    "As we know, ",
    "Note: ",
    "In the report we read: ",
    "However, ",
    "The teacher said: ",
    "Yesterday. ",
)
"""What may stand before a prompt."""
FRAMES = ("{}:", "{} -", "About {}:", "When I hear {}, I think of", "{}, in short:", "{}? The answer is")
"""What may stand around a subject in place of the prompt."""


def rewordings(fact: Fact) -> list[Fact]:
    """The fact behind every opening and, where it has a subject, in every frame; without a subject of their own."""
    prompts = [opening + fact.prompt for opening in OPENINGS]
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
