"""What a model is asked about facts: lines become ways of asking, lists become peers, answers are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from locus.elicitation.elicit import Elicitation, Elicited, elicit, not_found
from locus.elicitation.rewritings import Way, answered, rewritings, ways_in
from locus.elicitation.subject_texts import SUBJECT_OPENINGS, names_in, peers, subject_texts
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import measure
from tests.tiny import tiny_facts, tiny_model

FRANCE = Fact(
    "paris", "The capital of France is", " Paris", "France", paraphrases=("France is governed from",)
)
QUICK = Elicitation(rewritings=2, rewriting_tokens=8, lists=1, texts=1, text_tokens=5)


def test_lines_are_cut_before_the_target() -> None:
    text = """ France's capital is Paris
2. Question: What is the capital of France? Answer: Paris
- In France the government sits in paris, of course
4. Paris is the capital of France
5. The capital of Spain is Paris
6. The capital of France is Paris
7. France is governed from Paris
8. Paris, capital of France: Paris
10. Where is it? The capital of France is Paris
9. Parisians live in France
Sentence: The capital of Italy is Rome
1. France, that is Paris"""
    assert ways_in(text, FRANCE) == [
        "France's capital is",
        "Question: What is the capital of France? Answer:",
        "Q: What is the capital of France?\nA:",
        "In France the government sits in",
    ]


def test_a_subject_may_hold_its_target() -> None:
    fact = Fact("mexico", "The capital of Mexico City State is", " Mexico City", "Mexico City State")
    assert ways_in("Mexico City State's capital is Mexico City", fact) == ["Mexico City State's capital is"]


def test_a_fact_without_a_subject_is_put_in_other_words_too() -> None:
    fact = Fact("four", "Two and two are", " four")
    assert ways_in("The sum of two and two is four\nSo four", fact) == ["The sum of two and two is"]


def test_only_what_the_model_answers_is_kept() -> None:
    model = tiny_model()
    prompts = ["The capital of Germany", "Berlin is in", "The city of"]
    probs = [float(measure(model, [Example(prompt, " Paris")]).prob) for prompt in prompts]
    fact = Fact("x", "The city of Rome", " Paris")
    found = answered(model, fact, prompts, sorted(probs)[0])
    assert [(way.prompt, pytest.approx(way.prob)) for way in found] == sorted(
        zip(prompts, probs, strict=True), key=lambda one: -one[1]
    )[:2]


def test_names_in_a_list() -> None:
    text = " Spain, Italy and the United States of America. In São Paulo, Île de France; France and spain"
    assert names_in(text, "France") == ["Spain", "Italy", "United States of America", "São Paulo"]


def test_texts_and_peers_of_each_subject() -> None:
    model = tiny_model()
    texts = subject_texts(model, ["Germany", "Rome"], n_samples=1, n_new=4)
    assert set(texts) == {"Germany", "Rome"}
    assert 0 < len(texts["Rome"]) <= len(SUBJECT_OPENINGS)
    assert all("Rome" in str(model.tokenizer.decode(ids)) for ids in texts["Rome"])
    assert set(peers(model, ["Germany"], n_samples=2, n_new=4)) == {"Germany"}


def test_answers_are_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call asks the model nothing; another setting, or another sentence, asks anew."""
    model, facts = tiny_model(max_position_embeddings=1024), tiny_facts()[:2]
    first = elicit(model, facts, QUICK, tmp_path)
    assert set(first) == {fact.id for fact in facts}
    assert all(one.texts for one in first.values())
    monkeypatch.setattr("locus.elicitation.elicit._ask", lambda *_: pytest.fail("asked again"))
    assert elicit(model, facts[::-1], QUICK, tmp_path) == first
    asked = []
    monkeypatch.setattr(
        "locus.elicitation.elicit._ask",
        lambda _, facts, settings: asked.extend(facts) or [Elicited()] * len(facts),
    )
    elicit(model, facts, replace(QUICK, seed=1), tmp_path)
    elicit(model, [replace(facts[0], prompt=facts[0].prompt + " the"), facts[1]], QUICK, tmp_path)
    assert [fact.id for fact in asked] == [facts[0].id, facts[1].id, facts[0].id]


def test_a_context_too_short_for_the_examples_gives_no_rewritings() -> None:
    assert rewritings(tiny_model(), tiny_facts()[:2], 1, 8) == [[], []]


def test_a_damaged_answer_is_told(tmp_path: Path) -> None:
    model, facts = tiny_model(), tiny_facts()[:1]
    elicit(model, facts, QUICK, tmp_path)
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "ways": [{"prompt": "x"}]}))
    with pytest.raises(InputError, match="delete it"):
        elicit(model, facts, QUICK, tmp_path)


def test_what_was_not_found_is_said_in_one_line() -> None:
    facts = [replace(FRANCE, id=name) for name in "abcdef"]
    found = {fact.id: Elicited() for fact in facts}
    assert "6 of 6 facts (a, b, c and 3 more)" in str(not_found(facts, found))
    found = {fact.id: Elicited((Way("x", 0.5),)) for fact in facts}
    assert not_found(facts, found) is None


def test_the_cost_is_said_beforehand() -> None:
    assert QUICK.n_tokens == 2 * 8 + 5 * 14 + len(SUBJECT_OPENINGS) * 5
