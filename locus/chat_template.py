"""A fact as a turn of a conversation, written by the tokenizer's own chat template.

A question (TOFU's form, or a prompt that ends with "?") is what the user says, and the target what the model
answers. Any other prompt is begun again in the model's turn, and the target goes on from there:

    user: Complete: The Eiffel Tower is in the city of
    model: The Eiffel Tower is in the city of| Paris
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from locus.errors import InputError
from locus.readers.formats import TOFU_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION = re.compile(re.escape(TOFU_TEMPLATE).replace(r"\{\}", "(.*)"), re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """Prompt and target as the template writes them."""

    prompt: str
    """Everything up to the target: what others said, and what the model begins with."""
    target: str
    shift: int
    """What to add to a character offset in the plain prompt to find the same character here."""


def turn(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str) -> Turn:
    """The target as the model's answer in a conversation.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template: leave --chat out, or take an instructed model")
    asked = _QUESTION.fullmatch(prompt)
    is_question = asked is not None or prompt.rstrip().endswith("?")
    content = asked[1] if asked else prompt if is_question else f"Complete: {prompt}"
    said = target.strip() if is_question else (prompt + target).rstrip()
    head = _written(tokenizer, [("user", content)], begin_answer=True)
    whole = _written(tokenizer, [("user", content), ("assistant", said)])
    at = whole.find(said, len(head)) if whole.startswith(head) else -1
    lead = whole[len(head) : at] if at >= 0 else ""
    if is_question:
        space = " " if lead.endswith(" ") else ""  # that some templates write before an answer
        before = head + lead.removesuffix(" ")
        return Turn(before, space + said, head.rfind(content) - prompt.index(content))
    return Turn(head + lead + prompt, target, len(head + lead))


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], begin_answer: bool = False
) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer)
    assert isinstance(text, str)
    return text
