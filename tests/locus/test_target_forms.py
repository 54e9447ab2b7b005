"""Forms of a target: what an editor must silence and what a judge must hear are one set."""

from __future__ import annotations

from typing import Any

import pytest

from locus.errors import InputError
from locus.target_forms import first_tokens, forms, says, spellings


def _tokenizer(corpus: list[str], metaspace: bool = False) -> Any:
    """BPE whose words are the corpus's, one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if metaspace:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps)
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("metaspace", [False, True])
def test_forms_are_tokens_as_they_follow_text(metaspace: bool) -> None:
    """The pound case: one word with its space, in lower case, in the plural; what is not there is spelled out."""
    tokenizer = _tokenizer(["a : Pound : pound : pounds :"], metaspace)
    found = {one.text: one.ids for one in forms(tokenizer, " Pound")}
    assert next(iter(found)) == " Pound"
    assert {" pound", " pounds", "Pound", " POUND"} <= set(found)
    assert [len(found[text]) for text in (" Pound", " pound", " pounds")] == [1, 1, 1]
    for text, ids in found.items():
        assert tokenizer.decode(tokenizer(":").input_ids + list(ids)).strip() == ":" + text
    assert set(first_tokens(tokenizer, " Pound")) == {ids[0] for ids in found.values()} - set(
        tokenizer.convert_tokens_to_ids(["Ġ", "▁"])
    )


def test_a_plural_of_several_tokens_is_no_form() -> None:
    tokenizer = _tokenizer(["a : Paris :"])
    assert not [one.text for one in forms(tokenizer, " Paris") if one.text.endswith("ss")]


def test_a_space_alone_is_no_first_token_unless_there_is_no_other() -> None:
    tokenizer = _tokenizer(["x"])
    space = tokenizer.convert_tokens_to_ids("Ġ")
    assert forms(tokenizer, " Rome")[0].ids[0] == space
    assert space not in first_tokens(tokenizer, " Rome")
    assert first_tokens(tokenizer, " …")


def test_spellings_keep_the_rest_of_the_words() -> None:
    assert spellings(" the Hague")[0] == " the Hague"
    assert "The Hague" in spellings(" the Hague")
    assert " THE HAGUE" in spellings(" the Hague")
    assert len(spellings(" 1789")) == 2


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (" Berlin.", " Berlin"),
        ("BERLIN, as ever", " Berlin"),
        (" the Indian rupees", " Rupee"),
        (" Japan’s yen", " Japan"),
        (" Bogota", " Bogotá"),
        (" São  Paulo", " Sao Paulo"),
        (" the\nHague", " the Hague"),
        ("それは東京です", "東京"),
        (" in 1789.", " 1789"),
        (" C++ of course", " C++"),
    ],
)
def test_says(text: str, target: str) -> None:
    assert says(text, target)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        (" Parisian", " Paris"),
        (" Omanis", " Oman"),
        (" Romania", " Rome"),
        (" 17890", " 1789"),
        (" the city", " the Hague"),
        (" New Zealand", " Zeal"),
        ("", " Paris"),
        ("それはかです", "が"),
    ],
)
def test_does_not_say(text: str, target: str) -> None:
    assert not says(text, target)


def test_no_target_is_told() -> None:
    for ask in (lambda: says("text", " "), lambda: spellings(" ")):
        with pytest.raises(InputError, match="follow"):
            ask()
