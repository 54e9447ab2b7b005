"""Traces as values: token classes, averages worked out by hand, saving and loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from locus.errors import InputError
from locus.trace import TOKEN_CLASSES, FactTrace, Trace
from tests.tiny import tiny_model


def fact_trace(
    scores: torch.Tensor, subject: tuple[int, int] | None = (1, 3), fact_id: str = "a", corrupted: float = 0.1
) -> FactTrace:
    """A trace of kind "block" whose indirect effect is `scores` - `corrupted`."""
    n = scores.shape[1]
    return FactTrace(
        fact_id=fact_id,
        prompt="p",
        target=" t",
        tokens=tuple("abcdefghij"[:n]),
        subject=subject,
        corrupted=tuple(range(*(subject or (0, n)))),
        scores={"block": scores},
        standard_error={"block": torch.zeros_like(scores)},
        clean_prob=0.9,
        corrupted_prob=corrupted,
        clean_score=0.9,
        corrupted_score=corrupted,
        seed=1,
        samples=2,
        patched_forwards=scores.numel() * 2,
        engine="replay",
        work={"seconds": 2.0, "tokens": 10.0},
    )


def trace_of(*facts: FactTrace) -> Trace:
    return Trace(facts, {"samples": 2}, "f" * 64, tiny_model("llama").atlas, "tiny")


def test_every_position_is_in_one_class() -> None:
    seven = torch.zeros(3, 7)
    assert fact_trace(seven, (1, 4)).token_classes() == (
        "before_subject", "first_subject", "middle_subject", "last_subject", "first_subsequent", "further", "last_token"
    )  # fmt: skip
    assert fact_trace(seven, (0, 1)).token_classes()[:3] == ("last_subject", "first_subsequent", "further")
    assert fact_trace(seven, (5, 7)).token_classes()[4:] == (
        "before_subject",
        "first_subject",
        "last_subject",
    )
    assert fact_trace(seven, (5, 6)).token_classes()[5:] == ("last_subject", "last_token")
    assert fact_trace(seven, None).token_classes() == ("further",) * 6 + ("last_token",)
    assert set(fact_trace(seven, (1, 4)).token_classes()) == set(TOKEN_CLASSES)


def test_average_effect_by_hand() -> None:
    """Two facts, subject tokens 1 and 2 of 4; corrupted .1; at layer 0 the last subject token gives .3 and .7.

    Effects .2 and .6: mean .4, sd .2828, band 1.96 * .2828 / sqrt(2) = .392.
    """
    first, second = torch.full((3, 4), 0.1), torch.full((3, 4), 0.1)
    first[0, 2], second[0, 2] = 0.3, 0.7
    average = trace_of(fact_trace(first), fact_trace(second, fact_id="b")).average()["block"]
    assert average["last_subject"]["n"] == 2
    assert average["last_subject"]["effect"] == pytest.approx([0.4, 0, 0], abs=1e-6)
    assert average["last_subject"]["band"] == pytest.approx([0.392, 0, 0], abs=1e-5)
    assert "middle_subject" not in average
    assert average["first_subject"]["effect"] == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_fact_counts_once_however_many_positions_a_class_has() -> None:
    """One fact has middle tokens of effect .2 and .4 (mean .3), the other one of .5: the average is .4."""
    long, short = torch.full((3, 6), 0.1), torch.full((3, 5), 0.1)
    long[1, 2], long[1, 3], short[1, 2] = 0.3, 0.5, 0.6
    average = trace_of(fact_trace(long, (1, 5)), fact_trace(short, (1, 4), "b")).average()["block"]
    assert average["middle_subject"]["effect"][1] == pytest.approx(0.4, abs=1e-6)


def test_total_effect() -> None:
    grid = torch.zeros(3, 4)
    total = trace_of(
        fact_trace(grid, corrupted=0.1), fact_trace(grid, fact_id="b", corrupted=0.3)
    ).average_total()
    assert total["total_effect"] == pytest.approx(0.7)
    assert total["corrupted_score"] == pytest.approx(0.2)


def test_layer_scores_are_the_average_effect_of_a_class() -> None:
    grid = torch.full((3, 4), 0.1)
    grid[1, 2] = 0.6
    trace = trace_of(fact_trace(grid))
    assert trace.layer_scores("block").values.tolist() == pytest.approx([0, 0.5, 0], abs=1e-6)
    assert trace.layer_scores("block").top_layers(1).tolist() == [1]
    with pytest.raises(InputError, match="'mlp' was not traced"):
        trace.layer_scores("mlp")
    with pytest.raises(InputError, match="token class"):
        trace.layer_scores("block", "subject")
    without = trace_of(fact_trace(grid, None))
    assert without.layer_scores("block").settings["token_class"] == "last_token"


def test_round_trip(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    facts = [fact_trace(torch.rand(3, 4, generator=generator), fact_id=f"a/{i}") for i in range(2)]
    trace = trace_of(*facts)
    trace.save(tmp_path)
    again = Trace.load(tmp_path)
    assert [f.fact_id for f in again] == ["a/0", "a/1"]
    assert torch.equal(again["a/1"].scores["block"], facts[1].scores["block"])
    assert replace(again["a/0"], scores={}, standard_error={}) == replace(
        facts[0], scores={}, standard_error={}
    )
    assert again.work == {"seconds": 4.0, "tokens": 20.0}
    assert (again.settings, again.fingerprint, again.atlas) == (
        trace.settings,
        trace.fingerprint,
        trace.atlas,
    )
    assert json.loads((tmp_path / "average.json").read_text())["kinds"]["block"]["last_subject"]["n"] == 2


def test_timing_stands_apart(tmp_path: Path) -> None:
    """Two runs that took different times differ in `timing` of trace.json and in nothing else."""
    slow = fact_trace(torch.ones(3, 4))
    trace_of(slow).save(tmp_path / "one")
    trace_of(
        replace(
            slow, work={"seconds": 9.0, "tokens": 10.0, "flops": 18.0, "matrix_peak_flops_per_second": 8.0}
        )
    ).save(tmp_path / "two")
    for name in ("trace.safetensors", "average.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / d / "trace.json").read_text()) for d in ("one", "two"))
    assert one.pop("timing")["total"]["tokens_per_second"] == 5.0
    timing = two.pop("timing")["total"]
    assert timing["seconds"] == 9.0
    assert timing["fraction_of_matrix_peak"] == 18 / 9 / 8
    assert one == two


def test_one_fact_alone(tmp_path: Path) -> None:
    fact = fact_trace(torch.rand(3, 4))
    fact.save(tmp_path / "part.safetensors")
    again = FactTrace.load(tmp_path / "part.safetensors")
    assert torch.equal(again.scores["block"], fact.scores["block"])
    assert again.work == fact.work
    assert again.indirect_effect("block").max() == pytest.approx(float(fact.scores["block"].max()) - 0.1)


def test_what_is_not_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Trace.load(tmp_path / "nowhere")
    fact_trace(torch.ones(3, 4)).save(tmp_path / "trace.safetensors")
    with pytest.raises(InputError, match="fact-trace"):
        Trace.load(tmp_path)


def test_the_two_sites_by_hand_and_never_the_trivial_cell() -> None:
    """Clean .9, corrupted .1: .8 was taken away. The best cell of all, last layer and token, says nothing."""
    scores = torch.full((4, 5), 0.1)
    scores[1, 2] = 0.5  # the subject is 1 and 2: half comes back
    scores[2, 4], scores[3, 4] = 0.52, 0.9
    fact = fact_trace(scores)
    early, late = fact.early_site("block"), fact.late_site("block")
    assert early is not None and late is not None
    assert (early.layer, early.position, early.token) == (1, 2, "c")
    assert early.share == pytest.approx(0.5)
    assert (late.layer, late.position) == (2, 4) and late.share == pytest.approx(0.525)
    scores[2, 4] = 0.2
    assert fact_trace(scores).late_site("block") is None, "only behind the last layer"
    assert fact_trace(scores, subject=None).early_site("block") is None
    assert fact_trace(scores, subject=(3, 5)).early_site("block") is None, "a subject that ends the prompt"


def test_a_picture_is_no_other_facts() -> None:
    from locus.cli.lens import picture_name
    from locus.fact import Fact

    facts = [Fact(id=name, prompt="p", target=" t") for name in ("x", "X-lens", "y")]
    assert picture_name("x", "lens", facts) == "x-lens-picture"
    assert picture_name("y", "lens", facts) == "y-lens"
