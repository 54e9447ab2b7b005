from dataclasses import replace
from typing import Any

import pytest
import torch

from locus.errors import InputError
from locus.fact import Fact
from tests.tiny import tiny_facts, tiny_model
from tracing.comparing.compare_localizers import compare_localizer
from tracing.comparing.mask_agreement import overlap, overlap_matrix, stability, stability_of
from tracing.localizers.controls import LargestNorm, RandomNeurons
from tracing.localizers.saliency import GradientSaliency


def chosen(*indices: int) -> torch.Tensor:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[list(indices)] = True
    return mask.view(2, 5)


def test_overlap_and_jaccard_by_hand() -> None:
    a, b = chosen(0, 1, 2, 3), chosen(2, 3)
    assert overlap(a, b) == 1.0
    assert overlap(a, b, "jaccard") == 0.5
    assert overlap(chosen(0, 1), chosen(8, 9)) == 0.0
    assert overlap(chosen(), chosen()) == 1.0


def test_matrix_is_symmetric_with_ones() -> None:
    model = tiny_model("llama")
    runs = [RandomNeurons(seed=1).run(model), RandomNeurons(seed=2).run(model), LargestNorm().run(model)]
    matrix = overlap_matrix(runs, "25%")
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [1, 1, 1]
    assert float(matrix[0, 1]) == pytest.approx(overlap(runs[0].choose("25%"), runs[1].choose("25%")))


def test_stability_of_hand_made_masks() -> None:
    """Pairs share 1, 0 and 0 of 2: mean 1/6 * 2 = 1/3... in overlap 1/2, 0, 0, mean 1/6."""
    result = stability_of([chosen(0, 1), chosen(1, 2), chosen(8, 9)])
    assert result.pairs.tolist() == [0.5, 0.0, 0.0]
    assert result.mean == pytest.approx(1 / 6)
    assert result.low <= result.mean <= result.high
    assert result.chance == pytest.approx(0.2)


def test_a_control_that_looks_at_nothing_is_perfectly_stable() -> None:
    result = stability(LargestNorm(), tiny_model("llama"), tiny_facts(), budget="10%")
    assert (result.mean, result.low, result.high) == (1, 1, 1)


def test_saliency_over_paraphrases_and_halves() -> None:
    model = tiny_model("llama")
    by_words = stability(GradientSaliency(), model, tiny_facts(), budget="20%")
    assert len(by_words.pairs) == 1  # one paraphrase each: two wordings
    by_halves = stability(GradientSaliency(), model, tiny_facts(), over="facts", repetitions=4, budget="20%")
    assert len(by_halves.pairs) == 6
    assert 0 < by_halves.mean <= 1


def test_refuses_what_cannot_be_repeated() -> None:
    with pytest.raises(InputError, match="at least 2"):
        stability_of([chosen(0)])
    with pytest.raises(InputError, match="halved"):
        stability(LargestNorm(), tiny_model("llama"), tiny_facts()[:1], over="facts")


@pytest.mark.parametrize("over", ["paraphrases", "facts"])
def test_repetitions_are_of_whole_facts(over: str) -> None:
    """Subject, alternatives, neighbours and relation stay: what is repeated is the method that was run."""
    seen: list[Fact] = []

    class Watching(LargestNorm):
        def run(self, model: Any, facts: Any = (), retain: Any = None, *, batch_tokens: int = 0) -> Any:
            seen.extend(facts)
            return super().run(model, facts, retain)

    model, facts = tiny_model("llama"), tiny_facts()[:2]
    facts = [replace(fact, alternatives=(" Rome",), relation="r") for fact in facts]
    stability(Watching(), model, facts, over=over, repetitions=2)  # type: ignore[arg-type]
    assert len(seen) >= 2
    for fact in seen:
        (own,) = [one for one in facts if one.id == fact.id]
        assert (fact.alternatives, fact.relation, fact.neighbours) == (
            own.alternatives,
            own.relation,
            own.neighbours,
        )
        assert fact.subject == own.subject or own.subject not in fact.prompt
        assert {fact.prompt, *fact.paraphrases} == {own.prompt, *own.paraphrases}


def test_a_repetition_that_is_refused_leaves_the_run_standing() -> None:
    class Picky(LargestNorm):
        def run(self, model: Any, facts: Any = (), retain: Any = None, *, batch_tokens: int = 0) -> Any:
            if len(facts) < 4:
                raise InputError("needs four facts")
            return super().run(model, facts, retain)

    facts = [replace(tiny_facts()[0], id=str(i), paraphrases=()) for i in range(4)]
    found = compare_localizer(Picky(), tiny_model("llama"), facts, repetitions=2)
    assert found.mask.n_weights and "needs four facts" in found.skipped
