"""Facts as turns of a conversation: the answer's tokens are the target, and the subject is still found."""

from __future__ import annotations

import dataclasses

import pytest

from locus.chat_template import turn
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import collate
from locus.model import Model, wrap
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model, tiny_module, tiny_tokenizer

PLAIN = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] + '[end]\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] }}{% endif %}{% endfor %}"
)
"""Writes a space before the answer."""
THINKING = PLAIN.replace(
    "{{ '[' + m['role'] + ']\\n' + m['content']",
    "{{ '[' + m['role'] + ']\\n' + ('<think></think>\\n' if m['role'] == 'assistant' else '') + m['content']",
)
"""Begins the model's turn with something of its own."""


def chatting(template: str = PLAIN) -> Model:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return dataclasses.replace(tiny_model("smollm"), tokenizer=tokenizer, chat=True)


@pytest.mark.parametrize(
    ("template", "before", "target"),
    [
        (PLAIN, "[user]\nWho speaks?[end]\n[assistant]\n", "Rome"),
        (SPACED, "[INST] Who speaks? [/INST]", " Rome"),
        (THINKING, "[user]\nWho speaks?[end]\n[assistant]\n<think></think>\n", "Rome"),
    ],
)
@pytest.mark.parametrize("prompt", ["Who speaks?", "Question: Who speaks?\nAnswer:"])
def test_a_question_is_what_the_user_says(template: str, before: str, target: str, prompt: str) -> None:
    told = turn(chatting(template).tokenizer, prompt, " Rome")
    assert (told.prompt, told.target) == (before, target)
    assert told.prompt[prompt.index("speaks") + told.shift :].startswith("speaks")


@pytest.mark.parametrize("template", [PLAIN, SPACED, THINKING])
def test_a_beginning_is_begun_again_in_the_models_turn(template: str) -> None:
    told = turn(chatting(template).tokenizer, "The city of", " Rome")
    assert "Complete: The city of" in told.prompt
    assert told.prompt.endswith("The city of") and told.target == " Rome"
    assert told.shift == len(told.prompt) - len("The city of")


@pytest.mark.parametrize("fact", tiny_facts(), ids=lambda fact: fact.id)
def test_target_and_subject_are_found(fact: Fact) -> None:
    model = chatting()
    one = encode(model, fact)
    assert "".join(one.tokens[one.target_start :]).replace("\ufffd", "") == fact.target
    assert one.subject is not None
    assert "".join(one.tokens[slice(*one.subject)]).replace("\ufffd", "").strip() == fact.subject
    assert one.ids.count(model.bos) == 1
    batch = collate([one], [0])
    assert batch.labels.tolist() == list(one.target_ids)


def test_a_template_that_brings_its_own_bos_gets_no_second() -> None:
    model = chatting("{{ bos_token }}" + PLAIN)
    one = encode(model, Example("The city of", " Rome"))
    assert one.ids[0] == model.bos and one.ids.count(model.bos) == 1


def test_without_a_template_it_is_refused() -> None:
    with pytest.raises(InputError, match="no chat template"):
        wrap(tiny_module("smollm"), tiny_tokenizer(), chat=True)
    with pytest.raises(InputError, match="no chat template"):
        turn(tiny_tokenizer(), "The city of", " Rome")
