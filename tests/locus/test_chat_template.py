"""Facts as turns of a conversation: the answer's tokens are the target, and the subject is still found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from locus.chat_template import end_of_turn, turn
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import collate, label_logits, measure
from locus.model import Model, wrap
from locus.tokens import Encoded, encode
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


TRIMMING = PLAIN.replace("m['content']", "m['content'] | trim")
"""Llama-3's and Gemma's: white space around what is said is taken off."""
REASONING = PLAIN.replace("{{ '[assistant]\n' }}", "{{ '[assistant]\n<think>\n' }}")
"""DeepSeek-R1's: opens a reasoning block for the model to fill, and leaves it out of what was said."""
OPEN = REASONING.replace(
    "+ m['content']", "+ ('<think>\n' if m['role'] == 'assistant' else '') + m['content']"
)
"""Opens the block in a finished turn too."""
SHOUTING = PLAIN.replace("m['content']", "m['content'] | upper")
ASKING_LOUDLY = PLAIN.replace(
    "m['content']", "(m['content'] | upper if m['role'] == 'user' else m['content'])"
)


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


CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)
"""Ends a turn with a special token, and separates turns with a line break that no model writes."""


def chatting_with_special_tokens() -> Model:
    model = chatting(CHATML)
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    known = model.tokenizer.convert_tokens_to_ids("</s>")
    assert known < model.atlas.d_vocab or known == len(model.tokenizer) - 1
    return model


@pytest.mark.parametrize(
    ("template", "end"), [(PLAIN, "[end]"), (SPACED, ""), (THINKING, "[end]"), (CHATML, "</s>")]
)
def test_the_end_of_turn_is_what_the_template_writes(template: str, end: str) -> None:
    model = chatting_with_special_tokens() if template == CHATML else chatting(template)
    assert end_of_turn(model.tokenizer) == end


def test_an_answer_ends_with_the_end_of_its_turn() -> None:
    """One token of the target; in a question's plain form, and in the answer's text, nothing changes."""
    model = chatting_with_special_tokens()
    for prompt in ("Who speaks?", "Question: Who speaks?\nAnswer:"):
        one = encode(model, Example(prompt, " Rome"))
        assert one.tokens[-1] == "</s>" and one.n_end == 1
        assert one.without_end.tokens == one.tokens[:-1] and one.without_end.n_end == 0
        assert one.target_start == one.without_end.target_start
    plain = encode(dataclasses.replace(model, chat=False), Example("Who speaks?", " Rome"))
    assert plain.n_end == 0 and plain.without_end is plain


@pytest.mark.parametrize(
    ("target", "ends"),
    [(" Rome", False), (" I don't know.", True), (' "Rome."', True), (" Rome, no", False), (" 罗马。", True)],
)
def test_what_goes_on_from_a_prompt_ends_the_turn_with_its_sentence(target: str, ends: bool) -> None:
    told = turn(chatting_with_special_tokens().tokenizer, "The city of", target)
    assert told.end == ("</s>" if ends else "")


def test_every_refusal_that_an_edit_teaches_ends_the_turn() -> None:
    """After a question and after a prompt that is begun again: else a model taught to refuse does not stop."""
    from editors.refusals import REFUSALS

    model = chatting_with_special_tokens()
    for prompt in ("Who speaks?", "The city of"):
        for said in REFUSALS:
            assert encode(model, Example(prompt, said)).n_end == 1


def test_a_generation_in_conversation_stops_at_the_end_of_turn() -> None:
    """Where the end is one token of the vocabulary; otherwise at the tokenizer's own end of text alone."""
    from locus.audit.attacks.generation import end_tokens

    model = chatting_with_special_tokens()
    eos, end = model.tokenizer.eos_token_id, model.tokenizer.convert_tokens_to_ids("</s>")
    assert set(end_tokens(model)) == {eos, end}
    assert set(end_tokens(dataclasses.replace(model, chat=False))) == {eos}
    assert set(end_tokens(chatting())) == {eos}


def test_a_template_that_ends_nothing_leaves_the_answer_as_it_is() -> None:
    one = encode(chatting(SPACED), Example("Who speaks?", " Rome"))
    assert one.n_end == 0 and one.tokens[-1].strip() == "Rome"


def test_the_end_of_turn_counts_in_the_likelihood_and_not_in_being_right() -> None:
    """By hand: the NLL of both parts; right where the answer's own tokens are the first choice."""
    model = chatting()
    one = encode(model, Example("Who speaks?", " Rome"))
    assert one.n_end >= 1 and "".join(one.tokens[-one.n_end :]) == "[end]"
    batch = collate([one], [0])
    logits = label_logits(model, batch)
    n_said = one.n_target - one.n_end
    assert batch.ends.tolist() == [False] * n_said + [True] * one.n_end
    scores, said = measure(model, [one]), measure(model, [one.without_end])
    per_token = -logits.log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    assert float(scores.nll) == pytest.approx(float(per_token.sum()), rel=1e-5)
    assert float(said.nll) == pytest.approx(float(per_token[:n_said].sum()), rel=1e-5)
    first = dataclasses.replace(
        one, ids=(*one.ids[: one.target_start], *_choices(model, one, n_said), *one.ids[-one.n_end :])
    )
    assert measure(model, [first]).correct.all()


def _choices(model: Model, one: Encoded, n: int) -> list[int]:
    """The model's first choices, one after the other."""
    ids = list(one.ids[: one.target_start])
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[one.target_start :]


@pytest.mark.parametrize("end", ["", " ", "\n", "  \n\n"])
@pytest.mark.parametrize("start", ["", " ", "\n"])
@pytest.mark.parametrize("template", [PLAIN, TRIMMING, THINKING, REASONING, OPEN])
def test_the_subject_is_found_where_the_template_trims_the_question(
    template: str, start: str, end: str
) -> None:
    prompt = f"{start}What is the capital of Germany?{end}"
    one = encode(chatting(template), Fact("a", prompt, " Berlin", subject="Germany"))
    assert one.subject is not None
    assert one.tokens[slice(*one.subject)] == (" Germany",)
    tofu = Fact("b", f"Question: {prompt}\nAnswer:", " Berlin", subject="Germany")
    one = encode(chatting(template), tofu)
    assert one.subject is not None
    assert one.tokens[slice(*one.subject)] == (" Germany",)


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (REASONING, "[user]\nWho speaks?[end]\n[assistant]\n"),
        (OPEN, "[user]\nWho speaks?[end]\n[assistant]\n<think>\n\n</think>\n\n"),
    ],
)
def test_no_answer_stands_inside_a_reasoning_block(template: str, before: str) -> None:
    told = turn(chatting(template).tokenizer, "Who speaks?", " Rome")
    assert (told.prompt, told.target) == (before, "Rome")
    assert told.prompt[told.shift :].startswith("Who speaks?")
    told = turn(chatting(template).tokenizer, "The city of", " Rome")
    assert told.prompt == before.replace("Who speaks?", "Complete: The city of") + "The city of"


@pytest.mark.parametrize("answer", ["end", "think", "a", "assistant"])
@pytest.mark.parametrize("template", [PLAIN, REASONING, OPEN, THINKING])
def test_an_answer_that_the_template_says_too_is_not_taken_for_it(template: str, answer: str) -> None:
    tokenizer = chatting(template).tokenizer
    told = turn(tokenizer, "Who speaks?", f" {answer}")
    assert (told.prompt, told.target) == (turn(tokenizer, "Who speaks?", " Rome").prompt, answer)


def test_a_template_that_changes_the_words_is_refused() -> None:
    with pytest.raises(InputError, match=r"chat template does not write the answer 'Rome' as it is given"):
        turn(chatting(SHOUTING).tokenizer, "WHO SPEAKS?", " Rome")
    with pytest.raises(
        InputError, match=r"chat template does not write the question 'Who speaks\?' as it is given"
    ):
        turn(chatting(ASKING_LOUDLY).tokenizer, "Who speaks?", " Rome")


@pytest.mark.parametrize("mark", ["？", "؟", "\u037e"])
def test_a_question_mark_of_any_script_asks(mark: str) -> None:
    told = turn(chatting().tokenizer, f"Who speaks{mark}", " Rome")
    assert told.prompt == f"[user]\nWho speaks{mark}[end]\n[assistant]\n"
