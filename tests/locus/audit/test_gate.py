"""Gates and comparisons: what is missing never passes, what is beaten never leads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from locus.audit.compare import compare, merge, pareto
from locus.audit.gate import check_gate, read_gate
from locus.errors import InputError


def _figure(mean: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": mean if low is None else low,
        "high": mean if high is None else high,
        "n": 16,
        "n_items": 16,
    }


def _state(name: str, role: str, forget: float, kept: float, kl: float = 0.01) -> dict[str, Any]:
    figures = {
        "forget.prob": _figure(forget, high=forget + 0.02),
        "paraphrase.top1": _figure(forget),
        "held_out.top1": _figure(kept, low=kept - 0.1),
        "text.kl": _figure(kl),
    }
    return {
        "name": name,
        "role": role,
        "figures": figures,
        "ratios": {"kept": _figure(kept)},
        "change": {"off_mask": 0},
        "seconds": 1.0,
        "curves": {},
    }


def _document(**edits: tuple[float, float]) -> dict[str, Any]:
    def answers(forget: float, kept: float) -> list[dict[str, Any]]:
        said = {
            "forgotten": "yes" if forget < 0.05 else "no",
            "spared": "yes" if kept > 0.8 else "no",
            "intact": "yes",
        }
        return [{"question": q, "answer": a, "sentence": "", "evidence": []} for q, a in said.items()]

    return {
        "model": {"fingerprint": "f"},
        "states": [
            _state("base", "base", 0.7, 1.0),
            *(_state(n, "edit", f, k) for n, (f, k) in edits.items()),
        ],
        "verdicts": {name: answers(f, k) for name, (f, k) in edits.items()},
        "headline": dict.fromkeys(edits, "Said."),
        "comparisons": [],
        "facts": [
            {"id": "a", "group": "forget", "states": {name: {"prob": 0.0} for name in ["base", *edits]}}
        ],
        "missing": [],
        "seconds": 1.0,
    }


def _gate(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    return read_gate(path)


def test_a_gate_holds_means_worst_ends_ratios_changes_and_verdicts(tmp_path: Path) -> None:
    gate = _gate(
        tmp_path,
        """
        [figures."forget.prob"]
        max = 0.02
        [figures."held_out.top1"]
        min = 0.85
        end = "worst"
        [ratios.kept]
        min = 0.8
        [change.off_mask]
        max = 0
        [verdicts]
        forgotten = ["yes", "partly"]
        """,
    )
    results = check_gate(_document(good=(0.01, 0.9)), gate)
    assert [(r.what, r.passed) for r in results] == [
        ("forget.prob", True),
        ("held_out.top1", False),
        ("ratios kept", True),
        ("change off_mask", True),
        ("verdict forgotten", True),
    ]
    assert results[1].found.startswith("0.8") and "worse end" in results[1].wanted
    strict = _gate(tmp_path, '[figures."forget.prob"]\nmax = 0.02\nend = "worst"\n')
    assert not check_gate(_document(good=(0.01, 0.9)), strict)[0].passed


def test_missing_evidence_fails(tmp_path: Path) -> None:
    gate = _gate(
        tmp_path,
        '[figures."lens.top10"]\nmax = 1\n[ratios.recovered]\nmax = 9\n[change.off_mask]\nmax = 9\n'
        '[verdicts]\nreturns = ["yes", "no", "partly", "unclear"]\n',
    )
    doc = _document(good=(0.0, 1.0))
    doc["states"][1]["change"]["off_mask"] = None
    results = check_gate(doc, gate)
    assert len(results) == 4
    assert all(not r.passed and r.found == "not measured" for r in results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "asks for nothing"),
        ("[figures.nothing]\nmax = 1\n", "has no 'nothing'"),
        ('[figures."forget.prob"]\nmax = "low"\n', "must be numbers"),
        ('[figures."forget.prob"]\nmost = 1\n', "takes min, max"),
        ('[figures."forget.prob"]\nmax = 1\nend = "best"\n', "'best'"),
        ('[verdicts]\nforgotten = "not measured"\n', "answers yes"),
        ("[verdict]\nforgotten = 1\n", "unknown table"),
        ("[figures", "not TOML"),
    ],
)
def test_a_gate_that_cannot_be_read_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _gate(tmp_path, text)


def test_pareto_keeps_what_no_other_beats() -> None:
    assert pareto([[1.0, 5.0], [2.0, 4.0], [1.0, 4.0], [2.0, 4.0]]) == [True, True, False, True]
    assert pareto([[1.0]]) == [True] and pareto([[], []]) == [True, True]


def test_the_edit_to_ship_has_forgotten_and_broken_nothing() -> None:
    side = compare({"a": _document(strong=(0.0, 0.5), good=(0.01, 0.9), weak=(0.5, 1.0), worse=(0.02, 0.85))})
    assert side.recommended == "good" and "forgetting" in side.why
    assert {c.name: c.on_front for c in side.candidates} == {
        "strong": True,
        "good": True,
        "weak": True,
        "worse": False,
    }
    none = compare({"a": _document(strong=(0.0, 0.5), weak=(0.5, 1.0))})
    assert none.recommended is None and "ship none" in none.why


def test_flaws_are_told_and_so_is_why_the_others_are_not_the_one() -> None:
    doc = _document(good=(0.01, 0.9), lossy=(0.0, 0.5), rival=(0.01, 0.85))
    for name in ("good", "rival"):
        doc["verdicts"][name].append(
            {"question": "hidden", "answer": "no", "sentence": "Still readable.", "evidence": []}
        )
    doc["verdicts"]["lossy"][1]["sentence"] = "Other facts were lost."
    side = compare({"a": doc})
    assert side.recommended == "good" and side.flaws == ("Still readable.",)
    assert side.others["lossy"] == "Other facts were lost."
    assert "kept as much or more" in side.others["rival"] and "good" not in side.others


def test_an_edit_whose_side_effects_nobody_measured_is_not_shipped() -> None:
    doc = _document(only=(0.01, 0.9))
    doc["verdicts"]["only"][1] |= {"answer": "not measured", "sentence": "Other facts: not measured."}
    side = compare({"a": doc})
    assert side.recommended is None and "Other facts: not measured" in side.why
    assert side.others == {"only": "Other facts: not measured."}


def test_the_page_of_several_edits_says_which_to_ship(tmp_path: Path) -> None:
    from locus.audit.metric_table import FIGURES
    from locus.report import compare_report

    doc = _document(good=(0.01, 0.9), weak=(0.5, 1.0))
    doc["metrics"] = {k: {"label": f.label, "section": f.section, "better": f.better, "unit": f.unit,
                          "definition": f.definition} for k, f in FIGURES.items()}  # fmt: skip
    doc["model"] |= {"name": "tiny", "architecture": "llama", "n_parameters": 1, "dtype": "float32"}
    doc |= {"settings": {}, "versions": {}, "relations": [], "data": {"forget": 1, "held_out": 0}}
    answer = {"prob": 0.1, "correct": True}
    doc["facts"] = [{"id": "a", "group": "forget", "prompt": "p", "target": " t",
                     "states": {name: answer for name in ("base", "good", "weak")}}]  # fmt: skip
    for state in doc["states"]:
        state["change"] = None
    text = compare_report({"first": doc, "second": doc}, tmp_path).read_text()
    assert "Ship first: good." in text and "Forgetting against keeping" in text and "(Pareto)" in text


def test_an_objective_that_one_edit_lacks_takes_no_part() -> None:
    doc = _document(one=(0.01, 0.9), two=(0.01, 0.8))
    doc["states"][2]["figures"]["text.kl"] = None
    side = compare({"a": doc})
    assert side.missing == ("text.kl",) and "text.kl" not in side.objectives


def test_audits_of_other_models_or_facts_do_not_compare() -> None:
    doc, other = _document(one=(0.01, 0.9)), _document(one=(0.01, 0.9))
    assert [c.name for c in compare({"x": doc, "y": other}).candidates] == ["x: one", "y: one"]
    assert [s["name"] for s in merge({"x": doc, "y": other})["states"]] == ["base", "x", "y"]
    changed: Mapping[str, Any] = copy.deepcopy(other) | {"model": {"fingerprint": "g"}}
    with pytest.raises(InputError, match="different base models"):
        compare({"x": doc, "y": changed})
    other["facts"][0]["id"] = "b"
    with pytest.raises(InputError, match="different facts"):
        compare({"x": doc, "y": other})
    with pytest.raises(InputError, match="at least one"):
        compare({})


def _asked(doc: dict[str, Any], **model: object) -> dict[str, Any]:
    """The document of an audit that says what it asked."""
    doc["model"] |= {"dtype": "float32", "chat": False, "bos": 1, **model}
    doc["inputs"] = {
        "forget facts": {"prompt": "1"},
        "retain facts": {"prompt": "2"},
        "settings": {"relearn": {"lr": "3"}},
    }
    doc["facts"][0] |= {"prompt": "The capital of France is", "target": " Paris"}
    return doc


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["facts"][0].update(target=" Lyon"), "asks fact 'a' otherwise"),
        (lambda d: d["facts"][0].update(prompt="Paris is"), "asks fact 'a' otherwise"),
        (lambda d: d["model"].update(dtype="bfloat16"), "audited in float32, y in bfloat16"),
        (lambda d: d["model"].update(chat=True), "chat form"),
    ],
)
def test_audits_that_asked_something_else_do_not_compare(
    change: Callable[[dict[str, Any]], None], message: str
) -> None:
    one, other = _asked(_document(one=(0.01, 0.9))), _asked(_document(one=(0.01, 0.9)))
    assert compare({"x": one, "y": other}).unequal == ()
    change(other)
    with pytest.raises(InputError, match=message):
        compare({"x": one, "y": other})


def test_audits_with_other_settings_or_retain_facts_are_marked() -> None:
    one, other = _asked(_document(one=(0.01, 0.9))), _asked(_document(one=(0.01, 0.9)))
    other["inputs"] = {**one["inputs"], "retain facts": {"prompt": "9"}, "settings": {"relearn": {"lr": "4"}}}
    side = compare({"x": one, "y": other})
    assert side.unequal == ("y differs from x in retain facts: prompt, settings: relearn: lr",)
    assert merge({"x": one, "y": other})["notes"] == [f"Not asked alike: {side.unequal[0]}."]
    del other["inputs"]
    assert "y does not say all that it asked" in compare({"x": one, "y": other}).unequal[0]


def _with_verdicts(doc: dict[str, Any], name: str, **answers: str) -> dict[str, Any]:
    for question, answer in answers.items():
        doc["verdicts"][name].append(
            {"question": question, "answer": answer, "sentence": f"{question} {answer}.", "evidence": []}
        )
    return doc


def test_an_edit_that_other_wordings_bring_back_is_not_shipped() -> None:
    known = _with_verdicts(_document(only=(0.01, 0.9)), "only", general="no")
    side = compare({"a": known})
    assert side.recommended is None and "general no." in side.why


def test_a_recommendation_says_what_fails_and_what_nobody_measured() -> None:
    doc = _with_verdicts(_document(only=(0.01, 0.9)), "only", hidden="no", returns="partly")
    why = compare({"a": doc}).why
    assert "fails on inner layers" in why and "weak on staying away under attack" in why
    assert "not measured: other wordings" in why
