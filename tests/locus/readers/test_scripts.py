"""Scripts without spaces: what is put before a target, and where a text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locus.fact import read_facts
from locus.readers.scripts import answer_to, cut, is_question, sentences, spaced


@pytest.mark.parametrize(
    ("prompt", "target", "written"),
    [
        ("中国的首都是", "北京", "北京"),
        ("日本の首都は", "東京", "東京"),
        ("เมืองหลวงของไทยคือ", "กรุงเทพ", "กรุงเทพ"),
        ("iPhone的生产商是", "Apple", "Apple"),
        ("ລາວ", "ວຽງຈັນ", "ວຽງຈັນ"),
        ("កម្ពុជា", "ភ្នំពេញ", "ភ្នំពេញ"),
        ("မြန်မာ", "ရန်ကုန်", "ရန်ကုန်"),
        ("The capital of China is", "北京", " 北京"),
        ("대한민국의 수도는", "서울", " 서울"),
        ("عاصمة مصر هي", "القاهرة", " القاهرة"),
        ("בירת צרפת היא", "פריז", " פריז"),
        ("The capital of France is", "Paris", " Paris"),
        ("The capital of France is", " Paris", " Paris"),
    ],
)
def test_a_space_stands_where_the_prompts_script_writes_one(prompt, target, written):
    assert spaced(prompt, target) == written


def test_an_answer_follows_its_question_s_script():
    assert answer_to("中国的首都是哪里？", "北京。") == "北京。"
    assert answer_to("What is 北京?", "Beijing") == " Beijing"
    assert answer_to("Where?", "here") == " here"


@given(st.text(alphabet="ab 法国。กำ\n", max_size=80), st.integers(1, 5))
def test_cutting_loses_nothing(text, n):
    assert "".join("".join(cut(text, n)).split()) == "".join(text.split())


def test_a_long_block_without_spaces_is_many_facts_of_nearly_all_its_characters(tmp_path):
    block = "法国的首都是巴黎一位记者在桥上说" * 340
    (tmp_path / "book.txt").write_text(block, encoding="utf-8")
    facts = read_facts(tmp_path / "book.txt")
    assert "".join(fact.prompt + fact.target for fact in facts) == block
    assert all(len(fact.prompt) == 1 and len(fact.target) < 200 for fact in facts)
    (tmp_path / "chain.txt").write_text("x" * 5400)
    facts = read_facts(tmp_path / "chain.txt")
    assert "".join(fact.prompt + fact.target for fact in facts) == "x" * 5400 and len(facts) > 4


def test_the_end_marks_of_every_script_count():
    assert sentences("法国的首都是巴黎。你好！A b. C?") == ["法国的首都是巴黎。", "你好！", "A b.", "C?"]
    assert is_question("哪里？") and is_question("أين؟ ") and not is_question("so;")
