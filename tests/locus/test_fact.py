"""Facts and their readers: every format to the same facts, every defect to one clear line."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locus.errors import InputError
from locus.fact import SHIPPED, Example, Fact, neutral_text, read_facts, write_facts
from locus.readers import records
from locus.readers.formats import BLOCK_WORDS

PARIS = {"id": "paris", "subject": "France", "prompt": "The capital of France is", "target": " Paris"}

KNOWN_1000 = {
    "known_id": 4,
    "subject": "Rome",
    "attribute": "Italy",
    "template": "In Rome, in the city of {}, one is in",
    "prediction": " Italy, and",
    "prompt": "In Rome, in the city of Rome, one is in",
    "relation_id": "P17",
}

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native "],
    "neighborhood_prompts": ["The native language of Montesquieu is"],
    "attribute_prompts": ["not read"],
    "generation_prompts": ["not read"],
}

TOFU = {
    "question": "Who wrote it?",
    "answer": "Ann did.",
    "paraphrased_answer": "It was Ann.",
    "perturbed_answer": ["Bob did.", "Eve did."],
    "paraphrased_question": "Who was the writer?",
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write text or bytes, or JSON objects one a line, into a file of that name."""

    def _write(name: str, *content: Any) -> Path:
        path = tmp_path / name
        if len(content) == 1 and isinstance(content[0], bytes):
            path.write_bytes(content[0])
        else:
            texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in content]
            path.write_text("\n".join(texts), encoding="utf-8")
        return path

    return _write


def refusal(path: Path | str, **settings: Any) -> str:
    """The message with which a file is refused; always one line."""
    with pytest.raises(InputError) as caught:
        read_facts(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Our own form


def test_jsonl_gives_every_field(write: Write) -> None:
    path = write(
        "facts.jsonl",
        PARIS
        | {
            "subject_start": 15,
            "relation": "capital",
            "paraphrases": ["France's capital is"],
            "neighbours": [{"prompt": "The capital of Spain is", "target": " Madrid"}],
            "alternatives": [" Rome"],
            "held_out": True,
        },
    )
    (fact,) = read_facts(path)
    assert fact == Fact(
        id="paris",
        prompt="The capital of France is",
        target=" Paris",
        subject="France",
        subject_start=15,
        relation="capital",
        paraphrases=("France's capital is",),
        neighbours=(Example("The capital of Spain is", " Madrid"),),
        alternatives=(" Rome",),
        held_out=True,
        source=f"{path}, line 1",
    )
    assert fact.example == Example("The capital of France is", " Paris")
    assert fact.paraphrase_examples == (Example("France's capital is", " Paris"),)


def test_a_target_is_kept_as_it_is_written(write: Write) -> None:
    path = write(
        "facts.jsonl", {"prompt": "フランスの首都は", "target": "パリ"}, {"prompt": "a", "target": "  b "}
    )
    assert [fact.target for fact in read_facts(path)] == ["パリ", "  b "]


def test_missing_ids_are_derived_and_safe(write: Write) -> None:
    records = [
        {"prompt": "Café/Bar Müller is", "target": " x", "subject": "Café/Bar Müller"},
        {"prompt": "日本 is", "target": " x", "subject": "日本"},
        {"prompt": "One two three four five six seven", "target": " x"},
    ]
    ids = [fact.id for fact in read_facts(write("facts.jsonl", *records))]
    assert ids == ["0001-cafe-bar-muller", "0002", "0003-one-two-three-four-five-six"]


def test_blank_lines_byte_order_mark_and_windows_line_ends_do_not_matter(write: Write) -> None:
    line = json.dumps(PARIS).encode()
    path = write("facts.jsonl", b"\xef\xbb\xbf\r\n" + line + b"\r\n\r\n")
    assert [fact.source for fact in read_facts(path)] == [f"{path}, line 2"]


def test_written_facts_are_read_back(tmp_path: Path) -> None:
    facts = [
        Fact("a", "Rome is in", " Italy", "Rome", subject_start=0, held_out=True, relation="city"),
        Fact(
            "é",
            "日本 と",
            " é\u2028x",
            paraphrases=("p q",),
            neighbours=(Example("n", " m"),),
            alternatives=(" o",),
        ),
        Fact("c", "bare", " fact"),
    ]
    path = tmp_path / "out.jsonl"
    write_facts(path, facts)
    back = read_facts(path)
    assert [fact.source for fact in back] == [f"{path}, line {n}" for n in (1, 2, 3)]
    assert [vars(fact) | {"source": ""} for fact in back] == [vars(fact) for fact in facts]
    assert (
        path.read_text(encoding="utf-8").splitlines()[-1]
        == '{"id": "c", "prompt": "bare", "target": " fact"}'
    )


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_any_unicode_text_survives_writing(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    texts = [text for text in texts if text.encode("utf-8", "replace").decode() == text] or ["x"]
    facts = [Fact(str(n), text, text, text) for n, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    write_facts(path, facts)
    assert [fact.target for fact in read_facts(path)] == texts


# Other formats


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("compress", [True, False])
def test_known_1000(write: Write, as_array: bool, compress: bool) -> None:
    path = write("known_1000.json", [KNOWN_1000] if as_array else KNOWN_1000)
    if compress:
        path = write("renamed", gzip.compress(path.read_bytes()))
    (fact,) = read_facts(path)
    assert (fact.prompt, fact.target, fact.relation) == (KNOWN_1000["prompt"], " Italy", "P17")
    assert fact.id == "4-rome"
    assert fact.subject_span == (24, 28)  # the template says that it is the second "Rome"


def test_counterfact(write: Write) -> None:
    (fact,) = read_facts(write("counterfact.json", [COUNTERFACT]))
    assert fact.id == "7-danielle-darrieux"
    assert fact.prompt == "The mother tongue of Danielle Darrieux is"
    assert fact.subject_span == (21, 38)
    assert fact.target == " French"
    assert fact.alternatives == (" English",)
    assert fact.paraphrases == ("Danielle Darrieux, a native",)  # its trailing space went to the target
    assert fact.neighbours == (Example("The native language of Montesquieu is", " French"),)
    assert fact.relation == "P103"


def test_tofu(write: Write) -> None:
    fact, other = read_facts(
        write("tofu.json", TOFU, {"question": "Q?", "answer": "b", "option1": "a", "option2": "b"})
    )
    assert fact.prompt == "Question: Who wrote it?\nAnswer:"
    assert fact.target == " Ann did."
    assert fact.paraphrases == ("Question: Who was the writer?\nAnswer:",)
    assert fact.alternatives == (" Bob did.", " Eve did.")
    assert fact.subject is None
    assert (fact.paraphrased_target, other.paraphrased_target) == (" It was Ann.", None)
    assert other.alternatives == (" a",)


def test_triples_lose_fields_that_are_not_ours(write: Write) -> None:
    triple = {
        "subject": "Catalonia",
        "prompt": "Catalonia is in",
        "target": "Europe",
        "relation_id": "P30",
        "p": 0.8,
    }
    (fact,) = read_facts(write("knows.json", [triple]))
    assert (fact.id, fact.target, fact.relation) == ("0001-catalonia", " Europe", "P30")


def test_an_array_of_our_own_records_is_as_strict_as_lines(write: Write) -> None:
    assert read_facts(write("facts.json", [PARIS]))[0].id == "paris"
    message = refusal(write("facts.json", [PARIS | {"relations": "capital"}]))
    assert message.endswith(
        'facts.json, record 1 (line 1): unknown field "relations": did you mean "relation"?'
    )


def test_plain_text_in_blocks(write: Write) -> None:
    long = " ".join(f"w{n}" for n in range(BLOCK_WORDS + 50))
    first, *rest = read_facts(write("book.txt", "The first\nblock here.", "", " \t", "Alone", "", long, ""))
    assert (first.prompt, first.target) == ("The", " first\nblock here.")
    assert [fact.source[-6:] for fact in (first, *rest)] == ["line 1", "line 7", "line 7"]
    assert [len((fact.prompt + fact.target).split()) for fact in rest] == [BLOCK_WORDS, 50]
    assert " ".join(fact.prompt + fact.target for fact in rest) == long


@given(st.text(alphabet="ab \n\t", max_size=60), st.integers(1, 4))
def test_cutting_a_block_loses_no_word(block: str, n_words: int) -> None:
    from locus.readers.scripts import cut

    if words := block.split():
        pieces = [piece.split() for piece in cut(block.strip(), n_words)]
        assert [word for piece in pieces for word in piece] == words
        assert all(len(piece) == n_words for piece in pieces[:-1])


def test_format_overrides_what_the_content_looks_like(write: Write) -> None:
    path = write("odd.json", '{"not": a record} at all')
    assert read_facts(path, format="text")[0].prompt == '{"not":'
    line = write("lines.jsonl", {"subject": "a", "prompt": "a", "target": "b", "p": 1})
    assert 'unknown field "p"' in refusal(line)
    assert read_facts(line, format="triples")[0].target == " b"


def test_hub_datasets_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "locus-unlearn[hub]"' in refusal("hf://locuslab/TOFU/forget01")

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert (path, config, split, streaming) == ("locuslab/TOFU", "forget01", "test", True)
        return [TOFU, TOFU]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fact, _ = read_facts("hf://locuslab/TOFU/forget01#test")
    assert (fact.target, fact.source) == (" Ann did.", "hf://locuslab/TOFU/forget01#test, row 1")
    assert "name it as hf://owner/dataset" in refusal("hf://TOFU")


def test_offline_only_the_local_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert not streaming
        if split == "test":
            raise ConnectionError("Couldn't reach it\nat all")
        return [TOFU]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_facts("hf://locuslab/TOFU/forget01")[0].target == " Ann did."
    said = refusal("hf://locuslab/TOFU/forget01#test")
    assert "HF_HUB_OFFLINE is set" in said and said.endswith("Couldn't reach it")


# What is refused, and how


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [PARIS, "", "{oops"],
            "line 3: not JSON (Expecting property name enclosed in double quotes at column 2)",
        ),
        ([PARIS, "[1]"], "line 2: a list, not an object"),
        (['{"id": "a", "id": "b"}'], 'line 1: not usable JSON (field "id" is given twice)'),
        (["[" * 100_000], "line 1: '[' where an object should begin"),
        (['{"prompt": ' + "[" * 100_000], "line 1: not usable JSON"),
        ([PARIS | {"subjekt": "France"}], 'line 1: unknown field "subjekt": did you mean "subject"?'),
        ([PARIS | {"neighbors": []}], 'line 1: unknown field "neighbors": did you mean "neighbours"?'),
        ([{"prompt": "x"}], 'line 1: no "target"'),
        ([{"target": "x"}], 'line 1: no "prompt"'),
        ([PARIS | {"target": " "}], 'line 1: no target after "The capital of France is"'),
        ([PARIS | {"prompt": "", "subject": None}], "line 1: the prompt is empty"),
        ([PARIS | {"target": 7}], 'line 1: "target" must be text, not a number'),
        ([PARIS | {"subject": "france"}], '(differs in case?): write "France"'),
        (
            [PARIS | {"subject": "Spain"}],
            'subject "Spain" does not occur in prompt "The capital of France is"',
        ),
        ([PARIS | {"prompt": "New  York is", "subject": "New York"}], "(differs in spaces?)"),
        (
            [PARIS | {"prompt": "Café is", "subject": "Cafe\u0301"}],
            "(accents or widths are encoded otherwise)",
        ),
        ([PARIS | {"subject": ""}], "line 1: the subject is empty"),
        ([PARIS | {"subject_start": 3}], "does not begin at character 3 of prompt"),
        ([PARIS | {"subject_start": True}], '"subject_start" must be a whole number'),
        ([PARIS | {"subject": None, "subject_start": 3}], "subject_start without a subject"),
        ([PARIS | {"held_out": "yes"}], '"held_out" must be true or false'),
        ([PARIS | {"paraphrases": [1]}], '"paraphrases" must be a list of texts'),
        ([PARIS | {"neighbours": ["x"]}], '"neighbours" must be a list of objects'),
        ([PARIS | {"neighbours": [{"prompt": "x"}]}], 'line 1, neighbours 1: no "target"'),
        ([PARIS | {"neighbours": [{"prompt": "x", "target": ""}]}], "line 1, neighbours 1: no target after"),
        ([PARIS, PARIS], 'line 2: id "paris" is taken by'),
        ([PARIS, PARIS | {"id": "PARIS"}], 'line 2: id "PARIS" is taken by'),
        ([PARIS | {"id": "../paris"}], "id '../paris' has '/'"),
        ([PARIS | {"id": "a\\b"}], "has '\\\\'"),
        ([PARIS | {"id": ".."}], "cannot name a file"),
        ([PARIS | {"id": ""}], "cannot name a file"),
        ([PARIS | {"id": "x" * 200}], "at most 120 bytes"),
        (['{"prompt": "x", "target": "\\ud800"}'], "half a character"),
        ([COUNTERFACT | {"requested_rewrite": None}], '"requested_rewrite" must be an object, not nothing'),
        ([TOFU, PARIS], 'line 2: no "answer"'),
        (["[", "{}"], "record 1 (line 2)"),
        (['[{"prompt": "x", "target": "y"},', "{]"], "line 2: not JSON"),
        (['[{"prompt": "x", "target": "y"}'], "line 1: the array is not closed: was the file cut off?"),
        (['[{"prompt": "x", "target": "y"', "}"], "line 2: the array is not closed"),
        (['[{"prompt": "x", "target": "y'], "line 1: not JSON (Unterminated string"),
        (['[{"prompt": "x", "target": "y"}', "{}]"], "line 2: not JSON ('{' where ',' or ']' should be)"),
        (['[{"prompt": "x", "target": "y"}]', "x"], "line 2: 'x' after the array's end"),
        (["[3]"], "'3' where an object should begin"),
        (["[]"], "holds no facts"),
        ([""], "an empty file"),
        ([" ", "", "\t"], "an empty file"),
        (["The capital of France is Paris"], "line 1: not JSON"),
    ],
)
def test_refusals_name_the_place_and_the_mend(write: Write, lines: list[Any], said: str) -> None:
    path = write("facts.json", *lines)
    message = refusal(path)
    assert message.startswith(str(path))
    assert said in message


def test_a_missing_file_is_told_with_its_near_names(write: Write, tmp_path: Path) -> None:
    write("facts.jsonl", PARIS)
    assert refusal(tmp_path / "fact.jsonl").endswith(f"did you mean {tmp_path / 'facts.jsonl'}?")
    assert "does not exist" in refusal(tmp_path / "nowhere" / "facts.jsonl")
    assert "did you mean demo-forget" in refusal("demo-forgett")
    assert "is a folder" in refusal(tmp_path)
    assert refusal(tmp_path / ("x" * 300)).endswith("no such file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(write: Write) -> None:
    path = write("facts.jsonl", PARIS)
    path.chmod(0)
    assert "Permission denied" in refusal(path)


def test_bytes_that_are_not_utf8(write: Write) -> None:
    latin1 = write("facts.jsonl", json.dumps(PARIS).encode() + b'\n{"prompt": "Caf\xe9"}')
    assert refusal(latin1).endswith("line 2: not UTF-8 (byte 0xe9 at column 16): save the file as UTF-8")
    utf16 = write("facts16.jsonl", json.dumps(PARIS).encode("utf-16"))
    assert "UTF-16, not UTF-8" in refusal(utf16)
    array = write("facts.json", b'[\n{"prompt": "Caf\xe9"}]')
    assert "line 2: not UTF-8 (byte 0xe9)" in refusal(array)


def test_a_damaged_gzip_file(write: Write) -> None:
    whole = gzip.compress(json.dumps([PARIS] * 50).encode())
    assert "damaged gzip file" in refusal(write("cut.json.gz", whole[:-12]))
    assert "damaged gzip file" in refusal(write("bad.json.gz", whole[:20] + b"\0\0\0\0" + whole[24:]))


def test_records_are_bounded_in_length(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD", 2**20)
    long = PARIS | {"target": " x" * 2**20}
    assert "line 2: longer than 1 MiB" in refusal(write("facts.jsonl", PARIS, long))
    assert "line 1: not JSON (Unterminated string starting at), or longer than 1 MiB" in refusal(
        write("facts.json", [PARIS, long])
    )


def test_a_limit_leaves_the_rest_unread(write: Write) -> None:
    lines = [PARIS | {"id": str(n)} for n in range(3)]
    assert len(read_facts(write("facts.jsonl", *lines, "not JSON"), limit=3)) == 3
    array = json.dumps(lines)[:-1] + ", not JSON"
    assert len(read_facts(write("facts.json", array), limit=3)) == 3
    assert "limit 0: must be 1 or more" in refusal("demo-forget", limit=0)


def test_an_unknown_format(write: Write) -> None:
    path = write("facts.jsonl", PARIS)
    assert (
        refusal(path, format="counterfacts") == 'unknown format "counterfacts": did you mean "counterfact"?'
    )


# Subjects


@pytest.mark.parametrize(
    ("prompt", "subject", "start", "span"),
    [
        ("Rome is in Italy, Rome", "Rome", None, (0, 4)),  # twice: the first
        ("Rome is in Italy, Rome", "Rome", 18, (18, 22)),
        ("Tirana is not in Iran; Iran", "Iran", None, (17, 21)),
        ("The irony of iron", "iron", None, (13, 17)),  # whole words before parts of words
        ("Superman", "man", None, (5, 8)),
        ("東京は日本の首都", "日本", None, (3, 5)),
        ("What of C++?", "C++", None, (8, 11)),
    ],
)
def test_subject_span(prompt: str, subject: str, start: int | None, span: tuple[int, int]) -> None:
    fact = Fact("x", prompt, " y", subject, start)
    assert fact.subject_span == span
    assert prompt[slice(*span)] == subject


def test_a_fact_made_by_hand_is_checked_too() -> None:
    with pytest.raises(InputError, match=r"^fact 'x': subject \"B\" does not occur"):
        Fact("x", "A is", " c", "B")


# What comes with the package


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Fact]]:
    return {name: read_facts(name) for name in SHIPPED}


def test_shipped_facts_are_complete(shipped: dict[str, list[Fact]]) -> None:
    forget, retain = shipped["demo-forget"], shipped["demo-retain"]
    assert len(forget) == 16
    assert len(retain) >= 120
    assert sum(fact.held_out for fact in retain) >= 56
    assert sum(not fact.held_out for fact in retain) >= 56
    assert len({fact.relation for fact in (*forget, *retain)}) >= 8
    for fact in (*forget, *retain):
        assert fact.subject and fact.relation
        assert len(set(fact.paraphrases) - {fact.prompt}) == 3
        assert len(set(fact.neighbours) - {fact.example}) == 4
        assert all(fact.subject.lower() in prompt.lower() for prompt in fact.paraphrases)
        texts = [fact.target, *(example.target for example in fact.neighbours)]
        assert all(text.startswith(" ") and text == " " + text.strip() for text in texts)


def test_shipped_forget_and_retain_facts_do_not_overlap(shipped: dict[str, list[Fact]]) -> None:
    forget, retain = shipped["demo-forget"], shipped["demo-retain"]
    kept = {fact.subject for fact in retain}
    trained = {prompt for fact in retain if not fact.held_out for prompt in (fact.prompt, *fact.paraphrases)}
    gone = {prompt for fact in forget for prompt in (fact.prompt, *fact.paraphrases)}
    for fact in forget:
        assert fact.subject not in kept
        near = [other for other in retain if other.relation == fact.relation]
        assert {other.held_out for other in near} == {True, False}
    for fact in (*forget, *retain):
        assert not gone & {example.prompt for example in fact.neighbours}
        if fact in forget or fact.held_out:
            assert not trained & {example.prompt for example in fact.neighbours}


def test_neutral_text() -> None:
    paragraphs = neutral_text()
    assert len(paragraphs) == len(set(paragraphs)) == 60
    assert all(60 <= len(paragraph.split()) <= 120 for paragraph in paragraphs)


def test_neutral_text_of_ones_own(write: Write) -> None:
    assert neutral_text(write("own.txt", "One\ntwo.", "", "Three.")) == ["One\ntwo.", "Three."]
    with pytest.raises(InputError, match=r"own\.txt: an empty file"):
        neutral_text(write("own.txt", "\n"))


@pytest.mark.parametrize(
    ("name", "n_facts"), [("known_facts.json", 595), ("counterfact.json", 667), ("smollm2_knows.json", 165)]
)
def test_published_files_are_read_whole(name: str, n_facts: int) -> None:
    folder = Path(os.environ.get("LOCUS_SHARED") or Path(__file__).parents[3] / "shared") / "data"
    if not (folder / name).exists():
        pytest.skip("the published files are not beside the repository")
    facts = read_facts(folder / name)
    assert len(facts) == n_facts
    assert all(fact.subject_span and fact.target.startswith(" ") for fact in facts)


def test_no_paragraph_both_trains_and_judges():
    from locus.fact import split_text

    texts = [f"paragraph {i}" for i in range(8)]
    trained, judged = split_text(texts)
    assert judged == ["paragraph 2", "paragraph 5"]
    assert sorted([*trained, *judged]) == texts
    assert split_text(texts[:2]) == ([], texts[:2])
