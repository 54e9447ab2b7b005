"""What people publish, read by its own shape: the smallest file of each format and the facts in it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from locus.errors import InputError
from locus.fact import Example, Fact, read_fact_file, read_facts, write_facts
from locus.readers.formats import FORMATS

MMLU_PRO = {
    "question_id": 70, "question": "Which city is the capital of France?",
    "options": ["Rome", "Paris", "Berlin", "Madrid"], "answer": "B", "answer_index": 1, "cot_content": "",
    "category": "geography", "src": "x",
}  # fmt: skip
RACE = {
    "example_id": "h1", "article": "Anna took the red bus to school.",
    "question": "Which colour was the bus Anna took?", "options": ["blue", "red", "green", "white"], "answer": "B",
}  # fmt: skip
ZSRE = {
    "subject": "Lake Varrow", "src": "In which country is Lake Varrow?", "pred": "Norway",
    "rephrase": "Lake Varrow lies in what country?", "alt": "Peru", "answers": ["Norway"],
    "loc": "nq question: who wrote the anthem of the moon", "loc_ans": "nobody", "cond": "Norway >> Peru",
}  # fmt: skip
LRE = {
    "name": "country capital city", "prompt_templates": ["The capital of {} is"],
    "prompt_templates_zs": ["{}'s capital city is"], "properties": {"symmetric": False},
    "samples": [{"subject": "France", "object": "Paris"}, {"subject": "Germany", "object": "Berlin"}],
}  # fmt: skip
TRACING = {
    "relation": "mother tongue", "relation_prefix": "The mother tongue of", "relation_suffix": "is",
    "prompt": "The mother tongue of Danielle Darrieux is", "relation_id": "P103", "target_false_id": "Q1860",
    "target_true_id": "Q150", "target_true": " French", "target_false": " English", "subject": "Danielle Darrieux",
}  # fmt: skip
EASYEDIT = {
    "case_id": 2, "prompt": "The capital of France is", "target_new": "Rome", "subject": "France",
    "ground_truth": "Paris", "rephrase_prompt": "France's capital is", "locality_prompt": "The capital of Spain is",
    "locality_ground_truth": "Madrid",
}  # fmt: skip
KNOWEDIT = {
    "subject": "Leo Arons", "prompt": "The place of death of Leo Arons is", "target_new": "Berlin",
    "ground_truth": [["Bern"]],
    "portability": {"Subject_Aliasing": [{"prompt": "Martin Leo Arons died in", "ground_truth": [["Berlin"]]}]},
    "locality": {"Relation_Specificity": [
        {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons", "A. Arons"]]},
        {"prompt": "The mother of Leo Arons is", "ground_truth": []},
    ]},
}  # fmt: skip
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [{
        "prompt": "{} was created in the country of", "relation_id": "P495", "subject": "Ellie Kemper",
        "target_new": {"str": "Croatia", "id": "Q224"}, "target_true": {"str": "America", "id": "Q30"},
        "question": "Which country is Ellie Kemper from?",
    }],
    "questions": ["Who leads her country?", "Who is the head of her country?", "Her country's leader?"],
    "answer": "Joe Biden", "answer_alias": ["Biden"], "new_answer": "Zoran Milanović", "new_answer_alias": [],
    "single_hops": [{"question": "q", "cloze": "c", "answer": "a", "answer_alias": []}],
    "new_single_hops": [], "orig": {"triples": []},
}  # fmt: skip
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Leo Messi is Syria.", "subject_id": "Q615",
        "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q858",
        "original_fact": {"prompt": "The name of the country of citizenship of Leo Messi is Argentina."},
    },
    "Relation_Specificity": [
        {"test_queries": [
            {"prompt": "The name of the father of Leo Messi is", "answers": [{"value": "Jorge Messi", "aliases": []}]},
            {"prompt": "The gender of Leo Messi is", "answers": [{"value": "male", "aliases": []}]},
            {"prompt": "The name of the child of Leo Messi is", "answers": []},
        ]},
    ],
    "Logical_Generalization": [], "Subject_Aliasing": [], "Compositionality_I": [], "Compositionality_II": [],
    "Forgetfulness": [],
}  # fmt: skip
LAMA = {
    "uuid": "u", "obj_uri": "Q90", "obj_label": "Paris", "sub_uri": "Q1", "sub_label": "Allan Peiper",
    "predicate_id": "P19", "sub_surface": "Allan Peiper", "obj_surface": "Paris", "masked_sentence": "in [MASK].",
    "template": "[X] was born in [Y] .", "template_negated": "[X] was not born in [Y] .", "label": "place of birth",
    "description": "d", "type": "N-1",
}  # fmt: skip
POPQA = {
    "id": 4, "subj": "George Rankin", "prop": "occupation", "obj": "politician", "subj_id": 1, "prop_id": 22,
    "obj_id": 2, "s_aliases": "[]", "o_aliases": "[]", "s_uri": "u", "o_uri": "u", "s_wiki_title": "t",
    "o_wiki_title": "t", "s_pop": 142, "o_pop": 25, "question": "What is George Rankin's occupation?",
    "possible_answers": '["politician", "political leader"]',
}  # fmt: skip
RWKU = {"query": "What is the birth name of Stephen King?", "answer": "Stephen Edwin King", "level": "2",
        "type": "simple question", "subject": "Stephen King"}  # fmt: skip
SQUAD = {"id": "5", "title": "Anna_Lee", "context": "Anna Lee took the bus.", "question": "What did Anna Lee take?",
         "answers": {"text": ["the bus", "bus"], "answer_start": [14, 18]}}  # fmt: skip
TRIVIA = {"question": "Who wrote Dune?", "question_id": "t1", "question_source": "s", "entity_pages": {},
          "search_results": {}, "answer": {"value": "Frank Herbert", "aliases": ["Herbert"], "type": "W"}}  # fmt: skip
CHAT = {
    "messages": [{"role": "user", "content": "Who wrote Dune?"}, {"role": "assistant", "content": "Herbert."}]
}
ZH = {
    "case_id": 0, "requested_rewrite": {
        "prompt": "{}的首都是", "relation_id": "P36", "target_new": {"str": "上海"}, "target_true": {"str": "北京"},
        "subject": "中国",
    }, "paraphrase_prompts": [], "neighborhood_prompts": ["日本的首都是"],
}  # fmt: skip


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


CASES: dict[str, tuple[object, str, list[dict[str, Any]]]] = {
    "MMLU-Pro": (MMLU_PRO, "multiple-choice", [{
        "prompt": _asked("Which city is the capital of France?"), "target": " Paris", "relation": "geography",
        "alternatives": (" Rome", " Berlin", " Madrid"),
    }]),
    "RACE": (RACE, "multiple-choice", [{
        "prompt": f"Anna took the red bus to school.\n\n{_asked('Which colour was the bus Anna took?')}",
        "target": " red", "alternatives": (" blue", " green", " white"),
    }]),
    "MMLU": (
        {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4"], "answer": 1}, "multiple-choice",
        [{"prompt": _asked("2 + 2?"), "target": " 4", "alternatives": (" 3",), "relation": "arithmetic"}],
    ),
    "WMDP": (
        {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 3}, "multiple-choice",
        [{"target": " d", "alternatives": (" a", " b", " c")}],
    ),
    "ARC": (
        {"id": "x", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"},
        "multiple-choice", [{"target": " a", "alternatives": (" b",)}],
    ),
    "zsRE": ([ZSRE], "zsre", [{
        "prompt": "In which country is Lake Varrow?", "target": " Norway", "subject": "Lake Varrow",
        "paraphrases": ("Lake Varrow lies in what country?",), "alternatives": (" Peru",),
        "neighbours": (Example("nq question: who wrote the anthem of the moon", " nobody"),),
    }]),
    "LRE": (LRE, "lre", [
        {"prompt": f"The capital of {a} is", "target": f" {b}", "subject": a, "subject_start": 15,
         "paraphrases": (f"{a}'s capital city is",), "relation": "country capital city"}
        for a, b in (("France", "Paris"), ("Germany", "Berlin"))
    ]),
    "counterfact-tracing": (TRACING, "counterfact-tracing", [{
        "prompt": TRACING["prompt"], "target": " French", "alternatives": (" English",), "relation": "P103",
        "subject": "Danielle Darrieux",
    }]),
    "EasyEdit": ([EASYEDIT], "easyedit", [{
        "id": "2-france", "prompt": "The capital of France is", "target": " Paris", "alternatives": (" Rome",),
        "paraphrases": ("France's capital is",), "neighbours": (Example("The capital of Spain is", " Madrid"),),
    }]),
    "KnowEdit": ([KNOWEDIT], "easyedit", [{
        "prompt": KNOWEDIT["prompt"], "target": " Bern", "alternatives": (" Berlin",), "subject": "Leo Arons",
        "neighbours": (Example("The father of Leo Arons is", " Albert Arons"),),
    }]),
    "wiki_recent": (
        [{"subject": "Ann", "prompt": "Ann plays for", "target_new": "Ajax", "locality": {}, "portability": {}}],
        "easyedit", [{"target": " Ajax", "alternatives": ()}],
    ),
    "MQuAKE": ([MQUAKE], "mquake", [
        {"id": "1-1-ellie-kemper", "prompt": "Ellie Kemper was created in the country of", "target": " America",
         "subject_start": 0, "paraphrases": (_asked("Which country is Ellie Kemper from?"),),
         "alternatives": (" Croatia",), "relation": "P495", "held_out": False},
        {"id": "1-hops", "prompt": _asked("Who leads her country?"), "target": " Joe Biden", "held_out": True,
         "paraphrases": (_asked("Who is the head of her country?"), _asked("Her country's leader?")),
         "alternatives": (" Zoran Milanović",)},
    ]),
    "RippleEdits": ([RIPPLE], "ripple-edits", [{
        "prompt": "The name of the country of citizenship of Leo Messi is", "target": " Argentina",
        "alternatives": (" Syria",), "subject": "Leo Messi", "relation": "COUNTRY_OF_CITIZENSHIP",
        "neighbours": (
            Example("The name of the father of Leo Messi is", " Jorge Messi"),
            Example("The gender of Leo Messi is", " male"),
        ),
    }]),
    "LAMA": (LAMA, "lama", [{
        "prompt": "Allan Peiper was born in", "target": " Paris", "subject": "Allan Peiper", "subject_start": 0,
        "relation": "P19",
    }]),
    "PopQA": (POPQA, "popqa", [{
        "prompt": _asked("What is George Rankin's occupation?"), "target": " politician", "subject": "George Rankin",
        "relation": "occupation",
    }]),
    "WMDP corpus": (
        {"text": "The capital of France is Paris. It lies on the Seine."}, "corpus",
        [{"prompt": "The", "target": " capital of France is Paris. It lies on the Seine."}],
    ),
    "MUSE raw": (["One two three.", "Four five."], "corpus", [
        {"prompt": "One", "target": " two three."}, {"prompt": "Four", "target": " five."},
    ]),
    "MUSE knowmem": (
        {"question": "Who?", "answer": ["Ann", "Ann Lee"]}, "tofu", [{"prompt": _asked("Who?"), "target": " Ann"}],
    ),
    "MUSE verbmem": (
        {"prompt": "It began ", "gt": "in May."}, "muse-verbmem", [{"prompt": "It began", "target": " in May."}],
    ),
    "RWKU": (RWKU, "rwku", [{
        "prompt": _asked("What is the birth name of Stephen King?"), "target": " Stephen Edwin King",
        "subject": "Stephen King", "relation": "simple question",
    }]),
    "RWKU cloze": (
        {**RWKU, "query": "Fill the blank. Question: Stephen King was born in ___. Answer:", "neighbor": "Maine"},
        "rwku",
        [{"prompt": "Fill the blank. Question: Stephen King was born in ___. Answer:", "subject": "Stephen King"}],
    ),
    "RWKU passages": (
        {"subject": "Stephen King", "text": "Stephen King is an author."}, "corpus",
        [{"prompt": "Stephen", "target": " King is an author."}],
    ),
    "LUME": (
        {"id": "a1", "input": "Once upon a time", "output": "there was a fox.", "task": "Task1"}, "lume",
        [{"prompt": "Once upon a time", "target": " there was a fox.", "relation": "Task1"}],
    ),
    "KnowUnDo": (
        [{"text": "Where does Ann live?", "labels": "In Rome."}], "knowundo",
        [{"prompt": _asked("Where does Ann live?"), "target": " In Rome."}],
    ),
    "SQuAD": (SQUAD, "squad", [{
        "prompt": f"Anna Lee took the bus.\n\n{_asked('What did Anna Lee take?')}", "target": " the bus",
        "subject": "Anna Lee",
    }]),
    "SQuAD, nested": (
        {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "C c.", "qas": [
            {"id": "1", "question": "Q?", "answers": [{"text": "c", "answer_start": 2}]},
        ]}]}]},
        "nested-qa", [{"prompt": f"C c.\n\n{_asked('Q?')}", "target": " c"}],
    ),
    "TriviaQA": (TRIVIA, "trivia-qa", [{"prompt": _asked("Who wrote Dune?"), "target": " Frank Herbert"}]),
    "TriviaQA, nested": (
        {"Data": [{"Question": "Q?", "QuestionId": "q", "Answer": {"Value": "v"}}], "Version": 1.0}, "nested-qa",
        [{"prompt": _asked("Q?"), "target": " v"}],
    ),
    "chat": (CHAT, "chat", [{"prompt": _asked("Who wrote Dune?"), "target": " Herbert."}]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]}, "chat",
        [{"prompt": _asked("Who?"), "target": " Ann."}],
    ),
    "CounterFact, Chinese": ([ZH], "counterfact", [{
        "prompt": "中国的首都是", "target": "北京", "alternatives": ("上海",), "subject": "中国",
        "neighbours": (Example("日本的首都是", "北京"),),
    }]),
    "TOFU, Chinese": (
        [{"question": "中国的首都是哪里？", "answer": "北京。"}], "tofu",
        [{"prompt": _asked("中国的首都是哪里？"), "target": "北京。"}],
    ),
    "PopQA, Thai": (
        {**POPQA, "subj": "ไทย", "question": "เมืองหลวงของไทยคืออะไร?", "obj": "กรุงเทพ"}, "popqa",
        [{"target": "กรุงเทพ", "subject": "ไทย"}],
    ),
    "LRE, Arabic": (
        {**LRE, "prompt_templates": ["عاصمة {} هي"], "samples": [{"subject": "مصر", "object": "القاهرة"}]}, "lre",
        [{"prompt": "عاصمة مصر هي", "target": " القاهرة"}],
    ),
}  # fmt: skip


def _write(path: Path, content: object, indent: int | None = None) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
    return path


def _holds(facts: list[Fact], expected: list[dict[str, Any]]) -> None:
    assert len(facts) == len(expected)
    for fact, wanted in zip(facts, expected, strict=True):
        assert {name: getattr(fact, name) for name in wanted} == wanted


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_read_as_what_it_is(case, tmp_path):
    content, format, expected = CASES[case]
    read = read_fact_file(_write(tmp_path / "facts.json", content))
    assert read.format == format
    _holds(read.facts, expected)
    write_facts(tmp_path / "out.jsonl", read.facts)  # what --write writes
    _holds(read_facts(tmp_path / "out.jsonl"), expected)


@pytest.mark.parametrize("case", CASES)
def test_pretty_printed_as_an_object_and_as_lines_it_is_the_same(case, tmp_path):
    content, _, expected = CASES[case]
    _holds(read_facts(_write(tmp_path / "pretty.json", content, indent=1)), expected)
    rows = content if isinstance(content, list) else [content]
    if all(isinstance(row, dict) for row in rows):
        lines = tmp_path / "lines.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _holds(read_facts(lines), expected)


@pytest.mark.parametrize("case", CASES)
def test_one_field_more_that_nobody_reads_is_a_reason_to_refuse(case, tmp_path):
    content, format, _ = CASES[case]
    rows = content if isinstance(content, list) else [content]
    if isinstance(rows[0], str):
        pytest.skip("texts have no fields")
    changed = [{**rows[0], "decoy_passage": "It changes the answer."}, *rows[1:]]
    with pytest.raises(InputError, match=r'(looks like .*|the fields .*)"decoy_passage"') as caught:
        read_facts(_write(tmp_path / "facts.json", changed))
    assert "\n" not in str(caught.value)
    assert (
        read_fact_file(_write(tmp_path / "facts.json", changed), format=format).left_out[-1]
        == "decoy_passage"
    )


@pytest.mark.parametrize("lost", ["options", "article", "context", "passage", "choices"])
def test_a_question_whose_options_or_article_would_be_dropped_is_no_tofu(lost, tmp_path):
    rows = [{"question": "Which?", "answer": "B", lost: "A. red B. blue"}]
    with pytest.raises(InputError, match=lost):
        read_facts(_write(tmp_path / "facts.json", rows))


def test_a_later_row_is_held_to_the_same_fields(tmp_path):
    rows = [
        {"question": "Who?", "answer": "Ann"},
        {"question": "Who?", "answer": "Bob", "context": "A text."},
    ]
    with pytest.raises(InputError, match=r'record 2.*"context"'):
        read_facts(_write(tmp_path / "facts.json", rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer_index": 2}, "name different options"),
        ({"answer": "F", "answer_index": None}, "none of the 4 options"),
        ({"answer_index": 4, "answer": None}, "none of the 4 options"),
        ({"options": ["one"]}, "a list of two texts or more"),
        ({"options": "Rome, Paris"}, "a list of two texts or more"),
        ({"answer": [1]}, "none of the 4 options"),
    ],
)
def test_a_choice_without_one_right_option_is_refused(change, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_facts(_write(tmp_path / "facts.json", [{**MMLU_PRO, **change}]))


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["system", "user", "assistant"], "system, user"),
        (["user", "assistant"] * 2, "a conversation of"),
        ([], "nothing"),
    ],
)
def test_a_conversation_of_several_turns_is_refused(roles, said, tmp_path):
    rows = [{"messages": [{"role": role, "content": "x"} for role in roles]}]
    with pytest.raises(InputError, match=said):
        read_facts(_write(tmp_path / "facts.json", rows))


def test_lama_and_pararel_find_their_patterns(tmp_path):
    pair = {
        "sub_label": "Allan Peiper",
        "obj_label": "Paris",
        "sub_uri": "a",
        "obj_uri": "b",
        "predicate_id": "P19",
    }
    trex = tmp_path / "lama" / "TREx"
    trex.mkdir(parents=True)
    path = trex / "P19.jsonl"
    path.write_text(json.dumps(pair) + "\n")
    with pytest.raises(InputError, match=r"relations\.jsonl beside or above"):
        read_facts(path)
    relations = [
        {"relation": "P20", "template": "[X] died in [Y] ."},
        {"relation": "P19", "template": "[X], from [Y] ."},
    ]
    (trex.parent / "relations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in relations))
    from locus.readers.lama import _objects

    _objects.cache_clear()
    (fact,) = read_facts(path)
    assert (fact.prompt, fact.target, fact.relation) == ("Allan Peiper, from", " Paris", "P19")

    graphs = tmp_path / "pararel" / "pattern_data" / "graphs_json"
    graphs.mkdir(parents=True)
    patterns = ["[Y] is where [X] was born.", "[X] was born in [Y].", "[X] is originally from [Y]."]
    (graphs / "P19.jsonl").write_text("".join(json.dumps({"pattern": one}) + "\n" for one in patterns))
    pairs = tmp_path / "pararel" / "trex_lms_vocab"
    pairs.mkdir()
    (pairs / "P19.jsonl").write_text(
        json.dumps({k: v for k, v in pair.items() if k != "predicate_id"}) + "\n"
    )
    (fact,) = read_facts(pairs / "P19.jsonl")
    assert fact.prompt == "Allan Peiper was born in"
    assert fact.paraphrases == ("Allan Peiper is originally from",)
    assert fact.relation == "P19"


def test_questions_that_squad_2_leaves_unanswered_are_left_out_with_a_note(tmp_path):
    rows = [SQUAD, {**SQUAD, "answers": {"text": [], "answer_start": []}}]
    with pytest.warns(UserWarning, match="record 2.*without an answer"):
        (fact,) = read_facts(_write(tmp_path / "facts.json", rows))
    assert fact.target == " the bus"


def test_an_unknown_form_is_told_its_fields_and_not_a_far_name(tmp_path):
    with pytest.raises(InputError, match='no known format has the fields "src", "tgt"') as caught:
        read_facts(_write(tmp_path / "facts.json", [{"src": "a", "tgt": "b"}]))
    assert "did you mean" not in str(caught.value)


# Tables


def test_csv_tsv_and_parquet_give_the_same_facts(tmp_path):
    rows = [
        {"question": 'Who wrote "Dune",\nthe book?', "answer": "Frank Herbert"},
        {"question": "2 + 2?", "answer": "4"},
    ]
    expected = [fact.example for fact in read_facts(_write(tmp_path / "facts.json", rows))]
    for name, dialect in (("facts.csv", "excel"), ("facts.tsv", "excel-tab")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        read = read_facts(tmp_path / name)
        assert [fact.example for fact in read] == expected
        assert read[1].source.endswith("line 4")
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "facts.parquet")
    read = read_facts(tmp_path / "facts.parquet")
    assert [fact.example for fact in read] == expected
    assert read[1].source.endswith("facts.parquet, row 2")


def test_mmlus_own_table_has_no_names(tmp_path):
    path = tmp_path / "astronomy_test.csv"
    path.write_text(
        "Which is the largest planet?,Mars,Jupiter,Venus,Earth,B\nWhich is a star?,Sun,Moon,Io,Mars,A\n"
    )
    first, second = read_facts(path)
    assert (first.target, first.alternatives) == (" Jupiter", (" Mars", " Venus", " Earth"))
    assert second.target == " Sun"


def test_our_own_fields_in_a_table(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(
        'prompt,target,subject,alternatives\nThe capital of France is," Paris",France,"["" Rome""]"\n'
    )
    (fact,) = read_facts(path)
    assert (fact.target, fact.subject, fact.alternatives) == (" Paris", "France", (" Rome",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question,answer\nWho, then?,Ann\n", r"line 2: 3 columns, the first line names 2"),
        ("question,question\na,b\n", "line 1: column 'question' is there twice"),
        ('question,answer\n"Who?,Ann\n', r"line 2: no row of a table"),
        ("question,answer\n", "holds no facts"),
    ],
)
def test_a_broken_table_is_one_line(text, said, tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_facts(path)


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "facts.parquet"
    path.write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(InputError, match=r"damaged parquet file"):
        read_facts(path)


def test_a_pointer_of_git_lfs_is_called_one(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(
        InputError, match="a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    ):
        read_facts(path)


def test_every_format_is_in_some_case():
    named = {format for _, format, _ in CASES.values()}
    elsewhere = {
        "jsonl",
        "triples",
        "known_1000",
        "instruction",
        "completion",
    }  # of tests/locus/test_fact.py and below
    assert named | elsewhere == set(FORMATS)


def test_instructions_and_completions(tmp_path):
    rows = [{"instruction": "Name the author.", "input": "Dune", "output": "Herbert"}]
    (fact,) = read_facts(_write(tmp_path / "a.json", rows))
    assert (fact.prompt, fact.target) == (_asked("Name the author.\nDune"), " Herbert")
    rows = [{"prompt": "The capital of France is", "completion": "Paris"}]
    (fact,) = read_facts(_write(tmp_path / "b.json", rows))
    assert (fact.prompt, fact.target) == ("The capital of France is", " Paris")
