"""Where targets begin and which tokens are the subject, under every kind of tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.tokens import Encoded, encode, encode_text
from tests.tiny import tiny_facts, tiny_model

if TYPE_CHECKING:
    from locus.model import Model

_CORPUS = [
    "The capital of France is Paris. The Eiffel Tower stands in Paris.",
    "In Łódź the Café Müller is not the Eiffel Tower.",
    "東京は日本の首都です。",
] * 3


def _byte_level(trim: bool, prefix: bool = False, kanji: bool = False) -> Any:
    """Byte-level BPE; with kanji in its corpus it has tokens of the end of one and the start of the next."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS if kanji else _CORPUS[:2] * 3, trainer)
    return tokenizer


def _sentencepiece(legacy: bool) -> Any:
    """BPE with byte fallback and a space put before the text: by the normalizer (legacy) or by Metaspace."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS[:1], trainer)
    if legacy:
        tokenizer.pre_tokenizer = None
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _unigram() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": functools.partial(_byte_level, trim=False),
    "byte-level, trimmed offsets": functools.partial(_byte_level, trim=True),
    "byte-level, kanji": functools.partial(_byte_level, trim=False, kanji=True),
    "byte-level, prefix space": functools.partial(_byte_level, trim=True, prefix=True),
    "sentencepiece": functools.partial(_sentencepiece, legacy=False),
    "sentencepiece, legacy": functools.partial(_sentencepiece, legacy=True),
    "unigram": _unigram,
    "words": _words,
}


@functools.cache
def _model(kind: str, bos: int | None = None) -> Model:
    """A tiny model that reads with another tokenizer; its weights are not run."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_TOKENIZERS[kind](), unk_token="<unk>")
    return dataclasses.replace(tiny_model(), tokenizer=tokenizer, bos=bos)


def text_of(tokens: tuple[str, ...]) -> str:
    """What the shown tokens read together."""
    return "".join(tokens).replace("\ufffd", "")


FACTS = [
    Fact("start", "Eiffel Tower is in", " Paris", "Eiffel Tower"),
    Fact("middle", "The Eiffel Tower is in", " Paris", "Eiffel Tower"),
    Fact("end", "The capital of France", " is Paris", "France"),
    Fact("whole", "France", " is", "France"),
    Fact("accents", "In Łódź the Café Müller stands in", " Paris", "Café Müller"),
    Fact("accent at the start", "Łódź is in", " France", "Łódź"),
    Fact("no spaces", "東京は日本の首都です。", "東京", "日本"),
    Fact("no spaces, start", "日本の首都です。", "東京", "日本"),
    Fact("twice", "Paris is not Paris and is", " Paris", "Paris"),
    Fact("twice, second", "Paris is not Paris and is", " Paris", "Paris", subject_start=13),
    Fact("more spaces", "Paris   is \n in", " France", "Paris   is"),
]


@pytest.mark.parametrize("kind", _TOKENIZERS)
@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.id)
def test_target_and_subject_are_found(kind: str, bos: int | None, fact: Fact) -> None:
    """The target's tokens read as the target; the subject's tokens as the subject, and no token more."""
    if kind in ("words", "byte-level, kanji") and fact.id.startswith("no spaces"):
        pytest.skip("its tokens do not end where the subject does")
    encoded = encode(_model(kind, bos), fact)
    shift = 0 if bos is None else 1
    assert encoded.ids[:shift] == (() if bos is None else (bos,))
    assert text_of(encoded.tokens[shift:]) == fact.prompt + fact.target
    assert text_of(encoded.tokens[encoded.target_start :]) == fact.target
    assert encoded.prompt_ids + encoded.target_ids == encoded.ids
    assert encoded.n_target == len(encoded.target_ids) > 0
    assert encoded.subject is not None and fact.subject is not None
    start, end = encoded.subject
    assert fact.subject_span is not None
    first, last = fact.subject_span
    read = [len(text_of(encoded.tokens[shift:index])) for index in (start, start + 1, end - 1, end)]
    assert read[0] <= first < read[1]
    assert read[2] < last <= read[3] or encoded.tokens[end - 1] == "\ufffd"  # the rest of its last character
    assert text_of(encoded.tokens[start:end]).strip() == fact.subject


def test_tokens_that_share_characters() -> None:
    """A byte-level token may hold the last byte of one character and the first of the next."""
    model = _model("byte-level, kanji")
    encoded = encode(model, Fact("x", "東京は日本の首都です。", " Paris", "日本"))
    assert encoded.subject is not None
    assert text_of(encoded.tokens[slice(*encoded.subject)]) == "日本の"  # the least that covers all of it
    assert text_of(encoded.tokens) == "東京は日本の首都です。 Paris"
    with pytest.raises(InputError, match="token '都で' covers the end of prompt '日本の首都' and the start"):
        encode(model, Example("日本の首都", "です"))


@pytest.mark.parametrize("kind", [kind for kind in _TOKENIZERS if kind != "words"])
@pytest.mark.parametrize("text", ["日本の首都です。", "東京は日本の首都です。", "都です"])
def test_running_text_without_spaces_is_cut_at_a_token(kind: str, text: str) -> None:
    """Its tokens are those of the whole text, whatever the tokenizer joins; all but a beginning is target."""
    model = _model(kind)
    for n in range(1, len(text)):
        one = encode(model, Example(text[:n], text[n:], running_text=True))
        alone = model.tokenizer(text, add_special_tokens=False).input_ids
        assert list(one.ids[-len(alone) :]) == alone and one.n_target >= 1
        said = text_of(one.tokens[one.target_start :]).replace("\ufffd", "")
        assert text[n + 2 :] in said and len(said) <= len(text) - n + 1
    if kind == "byte-level, kanji":
        with pytest.raises(InputError, match="'都で' covers"):
            encode(model, Example("日本の首都", "です。"))
        one = encode(model, Example("日本の首都", "です。", running_text=True))
        assert text_of(one.tokens[one.target_start :]) == "す。"


@pytest.mark.parametrize("kind", [kind for kind in _TOKENIZERS if kind != "words"])
@settings(deadline=None)  # the first call makes the tokenizer
@given(
    prompt=st.text(alphabet="ab é日.", min_size=1, max_size=12),
    target=st.text(alphabet="ab é日.", min_size=1, max_size=5),
)
def test_a_target_starts_a_token_or_is_refused(kind: str, prompt: str, target: str) -> None:
    """Against the slow way: cut the joint tokens everywhere and look which beginning reads as the prompt."""
    if not prompt.strip() or not target.strip():
        return
    model = _model(kind)
    try:
        encoded = encode(model, Example(prompt, target))
    except InputError as error:
        assert "covers the end of prompt" in str(error) or "does not know" in str(error)
        return
    assert text_of(encoded.tokens[: encoded.target_start]) == prompt
    assert text_of(encoded.tokens[encoded.target_start :]) == target


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed offsets", "sentencepiece"])
def test_a_space_on_the_wrong_side_is_told(kind: str) -> None:
    with pytest.raises(InputError) as caught:
        encode(_model(kind), Fact("x", "The capital of France is ", "Paris"))
    assert str(caught.value).startswith("fact 'x': token ' Pa")
    assert "end of prompt 'apital of France is ' and the start of target 'Paris'" in str(caught.value)
    assert str(caught.value).endswith("move the space to the target, ' Paris'")


def test_a_word_cut_in_two_is_told() -> None:
    with pytest.raises(
        InputError, match=r"token ' Tower' covers .*: begin the target with a space, ' wer', or move"
    ):
        encode(_model("byte-level"), Example("The Eiffel To", "wer"))


def test_special_tokens_are_the_models_bos_and_nothing_else() -> None:
    model = tiny_model()  # its tokenizer would put <s> in front by itself
    assert model.bos is not None
    fact = tiny_facts()[0]
    with_bos, without = encode(model, fact), encode(dataclasses.replace(model, bos=None), fact)
    assert with_bos.ids == (model.bos, *without.ids)
    assert with_bos.tokens[0] == "<s>"
    assert with_bos.target_start == without.target_start + 1
    assert with_bos.subject is not None and without.subject is not None
    assert with_bos.subject == tuple(place + 1 for place in without.subject)
    own = encode(model, Example("<s>" + fact.prompt, fact.target))
    assert own.ids == with_bos.ids  # a text that brings its BOS gets no second one


def test_a_character_the_tokenizer_lacks_is_no_target() -> None:
    with pytest.raises(InputError, match="does not know 'Atlantis' in the target"):
        encode(_model("words"), Example("The capital is", " Atlantis"))
    assert encode(_model("words"), Example("Atlantis is", " Paris")).n_target == 1


def test_a_text_longer_than_the_context_is_refused() -> None:
    fact = tiny_facts()[0]
    n_tokens = len(encode(tiny_model(), fact).ids)
    assert len(encode(tiny_model(max_position_embeddings=n_tokens), fact).ids) == n_tokens
    with pytest.raises(
        InputError, match=f"{n_tokens} tokens, but the context of tiny-llama holds {n_tokens - 1}"
    ):
        encode(tiny_model(max_position_embeddings=n_tokens - 1), fact)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    model = dataclasses.replace(tiny_model(), tokenizer=Slow())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a fast one \(tokenizer.json\) is needed"):
        encode(model, Example("a", " b"))


# Free text


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("block", [2, 3, 7, 1000])
def test_free_text_predicts_every_token_once(bos: int | None, block: int) -> None:
    model = _model("byte-level", bos)
    text = _CORPUS[1] + "\n\n" + _CORPUS[2]
    (whole,) = (
        encode_text(model, text, block=1000) if bos is None else encode_text(_model("byte-level"), text, 1000)
    )
    blocks = encode_text(model, text, block)
    targets = [token for one in blocks for token in one.target_ids]
    assert targets == list(whole.ids if bos is not None else whole.ids[1:])
    assert all(2 <= len(one.ids) <= block and one.target_start == 1 for one in blocks)
    assert all(len(one.tokens) == len(one.ids) for one in blocks)
    shown = [token for one in blocks for token in one.tokens[1:]]
    assert text_of((*((blocks[0].tokens[0],) if bos is None else ()), *shown)) == text
    if bos is not None:
        assert {one.ids[0] for one in blocks} == {bos}
    else:
        for before, after in itertools.pairwise(blocks):
            assert (after.ids[0], after.tokens[0]) == (before.ids[-1], before.tokens[-1])


def test_blocks_fit_the_context() -> None:
    model = tiny_model(max_position_embeddings=16)
    assert max(len(one.ids) for one in encode_text(model, "Germany " * 50)) == 16


def test_free_text_needs_something_to_predict() -> None:
    with pytest.raises(InputError, match="nothing to predict"):
        encode_text(_model("byte-level"), "")
    with pytest.raises(InputError, match="nothing to predict"):
        encode_text(_model("byte-level"), "a")
    (block,) = encode_text(_model("byte-level", 0), "a")  # with a BOS there is
    assert block == Encoded(ids=(0, block.ids[1]), target_start=1, subject=None, tokens=("!", "a"))
    with pytest.raises(InputError, match="give at least 2"):
        encode_text(_model("byte-level"), "a b", block=1)
