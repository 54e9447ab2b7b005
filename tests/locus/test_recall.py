"""What a model knows, counted; against asking one text at a time."""

from __future__ import annotations

import dataclasses

import pytest

from locus.errors import InputError
from locus.fact import Example, Fact, read_facts
from locus.forward import measure
from locus.model import load_model
from locus.recall import KnownFact, known, known_facts, summarize
from tests.tiny import tiny_facts, tiny_model


def test_each_text_is_scored_in_its_place() -> None:
    """One fact's row equals what the model gives to each of its texts alone, whatever the batches."""
    model = tiny_model()
    facts = [
        dataclasses.replace(fact, neighbours=(*fact.neighbours, *tiny_facts()[0].neighbours))
        for fact in tiny_facts()
    ]
    # Give each model's own first choice as some targets, so that right answers occur.
    facts.append(dataclasses.replace(facts[0], id="right", target=_greedy(facts[0].prompt), alternatives=()))
    found = known(model, facts, max_tokens=40)
    assert [one.fact for one in found] == facts
    for one in found:
        alone = measure(model, [one.fact])
        assert one.prob == pytest.approx(float(alone.prob[0]), rel=1e-4)
        assert one.right == bool(alone.correct[0])
        assert one.paraphrases == tuple(
            bool(measure(model, [example]).correct[0]) for example in one.fact.paraphrase_examples
        )
        assert one.neighbours == tuple(
            bool(measure(model, [example]).correct[0]) for example in one.fact.neighbours
        )
    assert found[-1].right and not all(one.right for one in found)
    assert known_facts(found) == [one.fact for one in found if one.right]
    assert known_facts(found, min_prob=1.0) == []


def _greedy(prompt: str) -> str:
    import torch

    from locus.tokens import encode

    model = tiny_model()
    ids = encode(model, Example(prompt, " Paris")).prompt_ids
    with torch.no_grad():
        ranked = model.module(torch.tensor([ids])).logits[0, -1].argsort(descending=True)
    assert int(ranked[0]) >= 3, "the first choice is a special token: take another seed"
    return str(model.tokenizer.decode(ranked[0]))


def test_summary_counts_texts_not_facts() -> None:
    """Paraphrases: 1 of 1 and 0 of 2 are a third, not a half; no neighbour at all is None, not 0."""
    fact = tiny_facts()[0]
    found = [
        KnownFact(fact, prob=0.75, right=True, paraphrases=(True,), neighbours=()),
        KnownFact(fact, prob=0.25, right=False, paraphrases=(False, False), neighbours=()),
    ]
    summary = summarize(found)
    assert dataclasses.astuple(summary) == (2, 0.5, 0.5, pytest.approx(1 / 3), None)
    assert dataclasses.astuple(summarize([])) == (0, None, None, None, None)


def test_an_error_names_the_text() -> None:
    fact = Fact(
        "x",
        "Paris is in",
        " France",
        neighbours=(Example("a", " b"), Example("The ", "city")),
        source="f, line 3",
    )
    with pytest.raises(InputError, match=r"^f, line 3, neighbour 2: token ' city' covers"):
        known(tiny_model(), [fact])


@pytest.mark.real
def test_the_shipped_facts_are_known() -> None:
    """As locus/data/README.md says; of the retained facts only the prompts are asked here, to save minutes."""
    model = load_model("smollm2")
    forget = known(model, read_facts("demo-forget"))
    bare = [dataclasses.replace(fact, paraphrases=(), neighbours=()) for fact in read_facts("demo-retain")]
    retain = known(model, bare)
    assert [one.fact.id for one in (*forget, *retain) if not one.right] == []
    assert all(all((*one.paraphrases, *one.neighbours)) for one in forget)
    assert summarize(forget).mean_prob == pytest.approx(0.773, abs=0.001)
    assert summarize(retain).mean_prob == pytest.approx(0.859, abs=0.001)
