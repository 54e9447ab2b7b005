"""The comparison of objectives and places: equal forgetting, and rates that are climbed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import frontier
from benchmarks.frontier import OWN, Bench, cell, merit
from benchmarks.inj import Lines
from benchmarks.lib.frontier_cases import Case, Questions
from benchmarks.lib.frontier_picture import draw
from benchmarks.lib.frontier_strength import equal_forgetting
from benchmarks.lib.frontier_tofu import COLUMNS, TofuJudge, per_token
from editors import GA, AlphaEdit, Training
from editors.deltas import scaled
from locus.audit.questions import Answers
from locus.audit.run import ask_about
from locus.audit.suites.tofu import Tofu
from locus.delta import WeightDelta
from locus.forward import measure
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from tests.tiny import tiny_facts, tiny_model


def case_of(model: Model, goal: float = 0.01) -> Case:
    """A case whose judge is not asked."""
    nothing = Questions("none", [], [])

    def judge(delta: WeightDelta, mask: WeightMask) -> dict[str, Any]:
        raise AssertionError("not to be judged")

    return Case("none", model, nothing, [], {"forget.prob": "p"}, {}, judge, goal=goal)


def test_the_strength_found_is_the_least_that_forgets_enough() -> None:
    model, facts = tiny_model("llama", num_hidden_layers=2), tiny_facts()
    before = float(measure(model, facts).prob.mean())
    mask = WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))
    training = Training(steps=3, lr=0.05, goal=0.0, floor=0.0, utility=0.0, max_kl=0.0)
    delta = GA(training=training).run(model, facts, [], mask)
    asked = ask_about(model, facts)["forget"]
    strength, prob = equal_forgetting(case_of(model, before / 2), delta, asked)
    assert strength is not None and 0 < strength < 1
    for factor, enough in ((1.0, True), (0.9, False)):
        with scaled(model, delta, factor * strength).applied(model):
            now = float(measure(model, facts).prob.mean())
        assert (now <= before / 2) == enough
        if enough:
            assert prob == pytest.approx(now, rel=1e-4)
    assert equal_forgetting(case_of(model, 0.0), delta, asked)[0] is None


def found(strength: float | None, held_out: float, kl: float = 0.0) -> dict[str, Any]:
    right = {"held_out": held_out, "neighbour": 0.5, "paraphrase": 0.2}
    return {"strength": strength, "prob": 0.009, "right": right, "kl": kl}


def test_merit_by_hand() -> None:
    """0.9 + 0.5 + (1 - 0.2) - 5 * 0.02."""
    assert merit(found(0.8, 0.9, 0.02)) == pytest.approx(2.1)
    assert merit(found(None, 1.0)) < merit(found(1.5, 0.0, 0.4))


def test_rates_are_doubled_for_as_long_as_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {1: 0.5, 2: 0.7, 4: 0.6, 8: 1.0}  # the summit beyond the valley is not looked for
    asked: list[float] = []

    def tried(self: Bench, name: str, place: str, rate: float, run: bool = True) -> dict[str, Any]:
        asked.append(round(rate / frontier.NEURONS_RATE))
        return found(1.0, kept[asked[-1]])

    monkeypatch.setattr(Bench, "tried", tried)
    bench = Bench(case_of(tiny_model("llama")), Lines(tmp_path / "lines.jsonl"))
    assert bench.best_rate("npo", "saliency") == 2 * frontier.NEURONS_RATE
    assert asked == [1, 2, 4]


def test_what_is_not_run_has_no_rate_and_no_row(tmp_path: Path) -> None:
    bench = Bench(case_of(tiny_model("llama")), Lines(tmp_path / "lines.jsonl"))
    assert bench.best_rate("npo", "full", run=False) is None
    assert bench.finished("dpo", "random-1") is None
    assert frontier.table(bench, frontier.rows(bench, ["npo"], ["saliency"])).count("\n") == 1


def test_rates_may_come_from_another_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    other = Bench(case_of(model), Lines(tmp_path / "other.jsonl"))
    bench = Bench(case_of(model), Lines(tmp_path / "lines.jsonl"), other)
    with pytest.raises(SystemExit, match="no rate yet"):
        bench.arm("npo", "saliency")
    for doublings, held_out in ((1, 0.9), (2, 0.5)):
        other.lines.add(
            other.key("rate", "npo", "saliency", doublings * frontier.NEURONS_RATE), found(1.0, held_out)
        )
    assert bench.rate("npo", "saliency") == frontier.NEURONS_RATE


def test_of_long_answers_the_probability_of_a_token_counts() -> None:
    """TOFU's: exp(-12 / 6), exp(-1 / 1); of the whole targets they would be exp(-12) and exp(-1)."""
    answers = Answers(
        ("a", "b"), torch.tensor([12.0, 1.0]), torch.tensor([6, 1]), torch.tensor([False, True])
    )
    assert per_token(answers).tolist() == pytest.approx([math.exp(-2), math.exp(-1)])


def test_tofus_judge_by_hand() -> None:
    """An edit that changes nothing: the base's own probabilities, no KL, and the reference's truth ratios."""
    model = tiny_model("llama")
    records = [
        {
            "question": f"Where is {city}?",
            "answer": f"In {country}.",
            "perturbed_answer": ["In Spain.", "In Peru."],
        }
        for city, country in (
            ("Rome", "Italy"),
            ("Paris", "France"),
            ("Berlin", "Germany"),
            ("Oslo", "Norway"),
        )
    ]
    suite = Tofu({"forget": records})
    kept = [replace(fact, held_out=True) for fact in tiny_facts()]
    asked = ask_about(model, suite.facts, kept)
    judge = TofuJudge(model, model, asked, suite, ["Rome is in Italy. Berlin is the capital of Germany."])
    mask = WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))
    figures = judge(WeightDelta({}, {}, {}, model.fingerprint), mask)
    scores = measure(model, suite.facts)
    expected = float((-scores.nll / scores.n_tokens).exp().mean())
    assert figures["forget"]["mean"] == pytest.approx(expected, rel=1e-4)
    held = measure(model, kept)
    assert figures["held_out"]["mean"] == pytest.approx(
        float((-held.nll / held.n_tokens).exp().mean()), rel=1e-4
    )
    assert figures["kl"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert figures["forget_quality"]["mean"] == pytest.approx(1.0)
    assert 0 < figures["relearned"]["mean"] < 1
    assert figures.keys() == COLUMNS.keys()


def test_edits_without_training_choose_their_own_layers() -> None:
    model = tiny_model("llama")
    bench = Bench(case_of(model), Lines(Path("none.jsonl")))
    assert bench.rate("alphaedit", OWN) == 0.0
    own = bench.may_change("alphaedit", OWN, bench.case.reported)
    assert set(own.entries) == set(AlphaEdit().own_mask(model).entries)


def test_cells_show_the_interval_or_the_seeds() -> None:
    assert cell([{"mean": 0.5, "low": 0.25, "high": 0.75}]) == "0.50 [0.25, 0.75]"
    assert cell([{"mean": 0.01}, {"mean": 0.03}]) == "0.02 [0.01, 0.03]"
    assert cell([None]) == ""


def test_unedited_models_stand_above_the_arms(tmp_path: Path) -> None:
    times: list[int] = []

    def beside() -> dict[str, Any]:
        times.append(1)
        return {"before": {"forget.prob": {"mean": 0.5, "low": 0.4, "high": 0.6}}}

    bench = Bench(replace(case_of(tiny_model("llama")), beside=beside), Lines(tmp_path / "lines.jsonl"))
    assert "before" not in frontier.table(bench, frontier.rows(bench, ["npo"], ["full"]))
    for _ in range(2):
        assert list(bench.beside()) == ["before"]
    assert len(times) == 1
    assert "| before | | | | 0.50 [0.4, 0.6] | |" in frontier.table(
        bench, frontier.rows(bench, ["npo"], ["full"])
    )


def test_the_picture_has_a_mark_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are one; a figure that the unedited model lacks is no line."""

    def finished(self: Bench, name: str, place: str) -> dict[str, Any] | None:
        seeds = {"random-0": 0.1, "random-1": 0.3, "full": 0.5}
        figures = {"kl": {"mean": 0.01}, "kept": {"mean": seeds.get(place)}}
        return {"strength": None, "figures": figures} if place in seeds else None

    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Bench, "finished", finished)
    monkeypatch.setattr(frontier, "draw", lambda *given: (drawn.append(given), draw(*given)))
    before = {"before": {"kl": {"mean": 0.0}, "kept": None}}
    case = replace(case_of(tiny_model("llama")), panels={"kept": "kept"}, beside=lambda: before)
    bench = Bench(case, Lines(tmp_path / "lines.jsonl"))
    bench.beside()
    frontier.picture(bench, frontier.rows(bench, ["npo"], frontier.PLACES), tmp_path / "drawn.png")
    ((dots, _, _, beside, path),) = drawn
    assert [(dot.place, dot.missed, dot.figures["kept"]) for dot in dots] == [
        ("random", True, pytest.approx(0.2)),
        ("full", True, 0.5),
    ]
    assert beside == {"before": {"kl": 0.0}} and path.read_bytes().startswith(b"\x89PNG")


def test_an_arm_of_a_direct_edit_is_another_when_its_defaults_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(case_of(tiny_model("llama")), Lines(tmp_path / "lines.jsonl"))
    before = bench.arm_key("alphaedit", OWN, 0.0)
    assert bench.arm_key("npo", "full", 1e-5) == bench.key("arm", "npo", "full", 1e-5)
    monkeypatch.setitem(frontier.EDITORS, "alphaedit", lambda: AlphaEdit(l2=0.3))
    assert bench.arm_key("alphaedit", OWN, 0.0) != before


def test_a_mask_is_located_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, lines = Questions("reported", tiny_facts(), []), Lines(tmp_path / "lines.jsonl")
    case = replace(case_of(tiny_model("llama")), points=2)
    located = Bench(case, lines).mask("knowledge-neurons", asked)
    monkeypatch.setattr(frontier, "mask_of", lambda *_: pytest.fail("located again"))
    again = Bench(case, lines).mask("knowledge-neurons", asked)
    assert again.n_weights > 0 and again.digest == located.digest
    with pytest.raises(pytest.fail.Exception):  # of other points it is another mask
        Bench(replace(case, points=3), lines).mask("knowledge-neurons", asked)
