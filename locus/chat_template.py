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
from locus.readers.scripts import is_question
from locus.readers.translation import TOFU_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SENTENCE_END = re.compile("[.!?…。！？][\"'”’)»\\]]*\\s*$")
_MARK = "locus-7f3a"
"""An answer that no template writes of itself: shows where it puts one."""
_OPENED = re.compile(r"<([\w:]*(?:think|thinking|thought|reason|reasoning|reflection))>\s*$")
"""A reasoning block that is open at a text's end."""
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

    Args:
        tokenizer: With a chat template.
        prompt: The question, or what the model is to have begun with.
        target: What it goes on with.

    Raises:
        InputError: the tokenizer has no chat template, or one that writes question or answer otherwise than they are
            given, apart from white space around them.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template: leave --chat out, or take an instructed model")
    asked = _QUESTION.fullmatch(prompt)
    asks = asked is not None or is_question(prompt)
    content = asked[1] if asked else prompt if asks else f"Complete: {prompt}"
    said = target.strip() if asks else (prompt + target).strip()
    before, head = _before_answer(tokenizer, content, said)
    if asks:
        space = " " if before.endswith(" ") else ""  # that some templates write before an answer
        shift = _place(head, content) - prompt.index(content)
        return Turn(before.removesuffix(" "), space + said, shift, end_of_turn(tokenizer))
    end = end_of_turn(tokenizer) if _SENTENCE_END.search(target) else ""
    return Turn(before + prompt, target, len(before), end)


def _before_answer(tokenizer: PreTrainedTokenizerBase, content: str, said: str) -> tuple[str, str]:
    """What the template writes before an answer, and its part up to where the model's turn begins.

    A template may begin the model's turn otherwise where it writes it whole than where the model is to write it:
    one that opens a reasoning block for the model leaves the block out of what was said. The answer stands where
    the template writes a finished one; a block that is still open there is closed.
    """
    begun = _written(tokenizer, [("user", content)], begin_answer=True)
    marked = _written(tokenizer, [("user", content), ("assistant", _MARK)])
    before = marked[: max(marked.rfind(_MARK), 0)]
    head = begun if before.startswith(begun) else before
    if not _written(tokenizer, [("user", content), ("assistant", said)]).startswith(before + said):
        raise InputError(
            f"the chat template does not write the answer {said[:40]!r} as it is given: leave --chat out, or mend the "
            "template"
        )
    if opened := _OPENED.search(before):
        before += f"\n</{opened[1]}>\n\n"
    return before, head


def _place(head: str, content: str) -> int:
    """Where a question begins in what the template wrote; a template may trim it.

    Raises:
        InputError: it is not there.
    """
    at = head.rfind(content)
    if at < 0 and (trimmed := content.strip()) and (at := head.rfind(trimmed)) >= 0:
        at -= content.index(trimmed)
    elif at < 0:
        raise InputError(
            f"the chat template does not write the question {content[:40]!r} as it is given: leave --chat out, or mend "
            "the template"
        )
    return at


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer for the model to stop: "<|im_end|>", "</s>" …

    It is read from a conversation that the template has written: up to the first special token after the answer, or,
    where there is none, without the white space that only separates turns. "" where the template writes nothing.
    """
    written = _written(tokenizer, [("user", "?"), ("assistant", _MARK)])
    tail = written[written.rfind(_MARK) + len(_MARK) :]
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
