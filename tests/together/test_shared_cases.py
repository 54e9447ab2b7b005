"""The smallest inputs of faults that were reported, from the folder beside the repository; skipped where it is not.

Each has its equivalent in the tests of the module that was at fault.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from locus.cli import execute
from locus.fact import Example, read_facts
from locus.model import load_model
from locus.tokens import encode
from tests.tiny import save_tiny, tiny_model

CASES = Path(os.environ.get("LOCUS_SHARED") or Path(__file__).parents[3] / "shared") / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the reported cases are not beside the repository")

READ: dict[str, list[dict[str, Any]]] = {
    "mmlu_pro.jsonl": [{"target": " Paris", "alternatives": (" Rome", " Berlin", " Madrid")}],
    "race.jsonl": [{"target": " red", "alternatives": (" blue", " green", " white")}],
    "counterfact_zh.json": [
        {"prompt": "中国的首都是", "target": "北京", "neighbours": (Example("日本的首都是", "北京"),)}
    ],
    "tofu_zh.json": [{"target": "北京。"}],
    "lre_capital.json": [
        {"prompt": f"The capital of {a} is", "target": f" {b}", "subject": a}
        for a, b in (("France", "Paris"), ("Germany", "Berlin"))
    ],
    "zsre_mend_eval.json": [
        {"prompt": "In which country is Lake Varrow?", "target": " Norway", "alternatives": (" Peru",)},
        {
            "prompt": "Which country has Paris as its capital?",
            "target": " France",
            "alternatives": (" Spain",),
        },
    ],
    "wmdp_corpus.jsonl": [{"prompt": "The"}, {"prompt": "The", "target": " capital of Germany is Berlin."}],
    "mixed_zh_en.txt": [
        {"prompt": "The"},
        {"prompt": "法", "target": "国的首都是巴黎，一位记者星期一在桥上说。"},
        {"prompt": "Another"},
    ],
    "tofu.parquet": [{"target": " The capital of France is Paris."}],
    "tiny_facts.jsonl": [{"target": " Paris"}, {"target": " is Berlin"}],
    "alt_facts.jsonl": [{"alternatives": (" Rome", " Berlin")}, {"alternatives": (" is Rome",)}],
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_what_it_is(name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    facts = read_facts(CASES / name)
    assert len(facts) == len(READ[name])
    for fact, right in zip(facts, READ[name], strict=True):
        assert {field: getattr(fact, field) for field in right} == right
    assert name != "race.jsonl" or facts[0].prompt.startswith("Anna took the red bus to school.")


def test_targets_without_their_space_are_noted():
    with pytest.warns(
        UserWarning, match=r'target_no_space\.jsonl, line 1: target "Paris" begins without a space'
    ):
        read_facts(CASES / "target_no_space.jsonl")


def test_a_token_past_the_embedding_is_named_before_anything_runs(tmp_path, capsys):
    model = tiny_model("llama")
    rows = len(model.tokenizer)
    model.tokenizer.add_tokens(["<|loc|>"])
    folder = save_tiny(model, tmp_path / "m")
    assert (
        execute(["trace", str(folder), str(CASES / "added_token_fact.jsonl"), "-o", str(tmp_path / "out")])
        == 2
    )
    said = capsys.readouterr().err
    assert re.search(rf"token '<\|loc\|>' has id {rows}, the embedding has {rows} rows", said), said


def test_every_paragraph_without_spaces_has_a_target(tmp_path):
    loaded = load_model(save_tiny(tiny_model("llama"), tmp_path / "m"))
    encoded = [encode(loaded, fact) for fact in read_facts(CASES / "mixed_zh_en.txt")]
    assert len(encoded) == 3 and all(one.n_target > one.target_start for one in encoded)
