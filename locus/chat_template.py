"""A fact as a turn of a conversation, written by the tokenizer's own chat template.

A question (TOFU's form, or a prompt that ends with "?") is what the user says, and the target what the model
answers. Any other prompt is begun again in the model's turn, and the target goes on from there:

    user: Complete: The Eiffel Tower is in the city of
    model: The Eiffel Tower is in the city of| Paris

An answer ends with the template's end of turn, which is part of the target: without it a model that is taught an
answer is not taught to stop. So does a target that ends the sentence of a prompt (a refusal); any other target that
goes on from a prompt is a piece of a sentence, after which the turn may go on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from locus.errors import InputError
from locus.readers.formats import TOFU_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCE_END = re.compile("[.!?…。！？][\"'”’)»\\]]*\\s*$")
_QUESTION = re.compile(re.escape(TOFU_TEMPLATE).replace(r"\{\}", "(.*)"), re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """Prompt and target as the template writes them."""

    prompt: str
    """Everything up to the target: what others said, and what the model begins with."""
    target: str
    """The target, with its leading space where it has one here."""
    shift: int
    """What to add to a character offset in the plain prompt to find the same character here."""
    end: str = ""
    """What ends the model's turn after the target; empty where the template writes nothing, or the turn goes on."""


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
        shift = head.rfind(content) - prompt.index(content)
        return Turn(before, space + said, shift, end_of_turn(tokenizer))
    end = end_of_turn(tokenizer) if _SENTENCE_END.search(target) else ""
    return Turn(head + lead + prompt, target, len(head + lead), end)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer for the model to stop: "<|im_end|>", "</s>" …

    It is read from a conversation that the template has written: up to the first special token after the answer, or,
    where there is none, without the white space that only separates turns. "" where the template writes nothing.
    """
    answer = "locus"
    written = _written(tokenizer, [("user", "?"), ("assistant", answer)])
    tail = written[written.rfind(answer) + len(answer) :]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [(tail.find(token), token) for token in special if token in tail]
    if not found:
        return tail.rstrip()
    place, token = min(found, key=lambda one: (one[0], -len(one[1])))
    return tail[: place + len(token)]


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], begin_answer: bool = False
) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer)
    assert isinstance(text, str)
    return text
