"""`locus audit` as it is typed: suites, attacks by name, a model that never knew, and a gate that says 3."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from locus.cli import execute
from locus.delta import WeightDelta
from locus.fact import write_facts
from locus.files.artefact import save_json
from locus.mask import WeightMask
from locus.selection import Selection
from tests.locus.audit.audit_model import facts, knowing, never_knew
from tests.tiny import save_tiny, tiny_model

GATE = '[figures."forget.prob"]\nmax = 0.9\n[verdicts]\nforgotten = ["yes", "partly", "no", "unclear"]\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("audit")
    base, edited = knowing(), never_knew()
    save_tiny(base, place / "base")
    save_tiny(edited, place / "edited")
    WeightDelta.between(base.module, edited.module).save(place / "delta.safetensors")
    forget, retain = facts()
    write_facts(place / "forget.jsonl", forget)
    write_facts(place / "retain.jsonl", retain)
    (place / "tofu").mkdir()
    record = {"answer": "Rome", "paraphrased_answer": "in Rome", "perturbed_answer": ["Paris", "Berlin"]}
    lines = (json.dumps({"question": f"Where is house {i}?", **record}) + "\n" for i in range(7))
    (place / "tofu" / "forget05_perturbed.json").write_text("".join(lines))
    return place


def _audit(place, out, *more, facts="forget.jsonl", edited="delta.safetensors"):
    argv = ["audit", place / "base", place / edited, place / facts, "-o", out, "-q", *more]
    return execute([str(a) for a in argv])


def _refused(capsys, code, *words):
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locus: ")]
    assert code == 2 and len(said) == 1
    assert all(word in said[0] for word in words), said[0]


def _document(out):
    return json.loads((out / "audit.json").read_text())


def test_attacks_are_chosen_by_name_and_the_others_are_missing(place, tmp_path):
    retain = ("--retain", place / "retain.jsonl")
    assert _audit(place, tmp_path / "a", *retain, "--attacks", "lens", "choice", "--lens-k", "2") == 0
    done = _document(tmp_path / "a")
    missing = {m["what"] for m in done["missing"]}
    assert "attack relearn" in missing and "attack lens" not in missing
    assert "truth ratio" in missing, "asked for, but no fact has wrong alternatives"
    assert list(done["states"][1]["curves"]["lens"]["k"]) == ["2"]
    assert _audit(place, tmp_path / "b", "--attacks", "none") == 0
    assert {m["what"] for m in _document(tmp_path / "b")["missing"]} >= {"attack lens", "held-out facts"}


def test_an_unknown_attack_suite_or_split_is_refused(place, tmp_path, capsys):
    out = tmp_path / "out"
    _refused(capsys, _audit(place, out, "--attacks", "lense"), "no attack 'lense'", "did you mean lens")
    _refused(capsys, _audit(place, out, "--suite", "glue"), "no suite 'glue'", "tofu")
    _refused(capsys, _audit(place, out, "--suite", "tofu", facts="forget.jsonl"), "forget01_perturbed.json")
    _refused(capsys, _audit(place, out, "--suite", "muse", facts="tofu"), "none of verbmem/forget.json")
    _refused(capsys, _audit(place, out, "--suite", "tofu", "--limit", "0", facts="tofu"), "limit 0")
    (place / "empty").mkdir(exist_ok=True)
    (place / "empty" / "forget01_perturbed.json").write_text("")
    _refused(capsys, _audit(place, out, "--suite", "tofu", facts="empty"), "empty suite")
    assert not (out / "audit.json").exists()


def test_tofu_from_its_folder_or_its_file_beside_a_model_that_never_knew(place, tmp_path):
    more = ("--suite", "tofu", "--never-knew", place / "edited", "--attacks", "none", "--limit", "6")
    assert _audit(place, tmp_path / "a", *more, facts="tofu") == 0
    assert _audit(place, tmp_path / "b", *more, facts="tofu/forget05_perturbed.json") == 0
    a, b = _document(tmp_path / "a"), _document(tmp_path / "b")
    assert [s["role"] for s in a["states"]] == ["base", "edit", "reference"]
    assert a["data"]["forget"] == 6
    figures = a["states"][1]["figures"]
    assert figures["tofu.forget_quality"]["mean"] == pytest.approx(1), "the edit is the retrained model"
    assert figures["tofu.probability"] == b["states"][1]["figures"]["tofu.probability"]
    assert figures["tofu.model_utility"] is None
    assert "TOFU model utility" in {m["what"] for m in a["missing"]}


def test_a_reference_of_another_tokenizer_or_architecture_is_refused(place, tmp_path, capsys):
    other = knowing()
    tokenizer = copy.deepcopy(other.tokenizer)
    tokenizer.add_tokens(["<extra>"])
    save_tiny(replace(other, tokenizer=tokenizer), tmp_path / "tokens")
    save_tiny(tiny_model("gpt2"), tmp_path / "gpt2")
    for folder, word in (("tokens", "tokenizer has other tokens"), ("gpt2", "architecture is")):
        _refused(
            capsys, _audit(place, tmp_path / "out", "--never-knew", tmp_path / folder), "never knew", word
        )


@pytest.mark.parametrize(
    ("gate", "code", "failed"),
    [
        (GATE, 0, 0),
        ('[figures."forget.prob"]\nmax = 0.0000001\n', 3, 1),
        ('[figures."text.kl"]\nmax = 9\n[figures."lens.top10"]\nmax = 1\n', 3, 1),
        ('[verdicts]\nlocalized = ["yes", "partly", "no", "unclear"]\n', 3, 1),
    ],
)
def test_the_gate_says_3_for_what_fails_and_for_what_was_not_measured(
    place, tmp_path, capsys, gate, code, failed
):
    (tmp_path / "gate.toml").write_text(gate)
    more = ("--gate", tmp_path / "gate.toml", "--attacks", "none", "--json")
    assert _audit(place, tmp_path / "out", *more) == code
    results = json.loads(capsys.readouterr().out)["gate"]
    assert sum(not r["passed"] for r in results) == failed and results


def test_tasks_need_the_harness(place, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code = _audit(place, tmp_path / "out", "--tasks", "hellaswag")
    _refused(capsys, code, "--tasks hellaswag", 'pip install "locus-unlearn[harness]"')


def test_the_mask_beside_a_delta_is_the_one_it_had_to_keep_to(place, tmp_path):
    """The folder of an edit keeps its mask: changes outside it are counted without --mask."""
    base, edited = knowing(), never_knew()
    delta = WeightDelta.between(base.module, edited.module)
    folder = tmp_path / "edit"
    delta.save(folder / "delta.safetensors")
    save_json(folder / "edit.json", "edit", {"method": "npo"})
    name = next(iter(delta.changes))
    rows = torch.tensor([0])
    shape = tuple(base.module.get_parameter(name).shape)
    WeightMask({name: Selection("rows", rows, shape)}).save(folder / "mask.safetensors")
    assert _audit(place, tmp_path / "out", "--attacks", "none", edited=folder) == 0
    change = next(s for s in _document(tmp_path / "out")["states"] if s["role"] == "edit")["change"]
    assert change["off_mask"] > 0


def test_an_edit_made_in_conversation_and_audited_plainly_gets_a_note(place, tmp_path, capsys):
    folder = tmp_path / "edit"
    WeightDelta.between(knowing().module, never_knew().module).save(folder / "delta.safetensors")
    save_json(folder / "edit.json", "edit", {"method": "idk", "chat": True})
    assert _audit(place, tmp_path / "out", "--attacks", "none", edited=folder) == 0
    document = _document(tmp_path / "out")
    assert document["model"]["chat"] is False and "audited plainly" in document["notes"][0]
    assert "audited plainly" in (tmp_path / "out" / "report.html").read_text()
    assert "audited plainly" in capsys.readouterr().err


def test_a_fact_that_has_to_go_and_to_stay_is_refused(place, tmp_path, capsys):
    code = _audit(place, tmp_path / "out", "--retain", place / "forget.jsonl")
    _refused(capsys, code, "cannot both go and stay", "home-Ann")


def test_another_seed_draws_otherwise_and_the_same_one_alike(place, tmp_path):
    """What is drawn: the facts shown (few_shot), the taught half (relearn, soft_prompt), the embeddings at first."""
    more = (
        "--retain",
        place / "retain.jsonl",
        "--attacks",
        "prompts",
        "relearn",
        "soft-prompt",
        "--relearn-at",
        "1",
    )

    def drawn(out, *options):
        assert _audit(place, tmp_path / out, *more, *options) == 0
        figures = _document(tmp_path / out)["states"][1]["figures"]
        return {key: figures[key] for key in ("prompts.few_shot.prob", "relearn.prob", "soft_prompt.prob")}

    first, again, other = drawn("a"), drawn("b", "--seed", "0"), drawn("c", "--seed", "5")
    assert first == again
    assert all(first[key] != other[key] for key in first)
    assert drawn("d", "--seed", "5", "--relearn-seed", "0")["relearn.prob"] == first["relearn.prob"]
    assert _document(tmp_path / "c")["settings"]["seed"] == 5


def test_resume_measures_nothing_twice(place, tmp_path, monkeypatch):
    from locus.audit.attacks.table import ATTACKS

    more = ("--attacks", "prompts", "--retain", place / "retain.jsonl")
    assert _audit(place, tmp_path / "a", *more) == 0

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setitem(ATTACKS, "prompts", (refuse, ""))
    before = _document(tmp_path / "a")
    assert _audit(place, tmp_path / "a", *more, "--resume") == 0
    after = _document(tmp_path / "a")
    assert [state["figures"] for state in after["states"]] == [state["figures"] for state in before["states"]]
    assert _audit(place, tmp_path / "a", *more, "--resume", "--seed", "1") == 1, (
        "another seed is measured anew"
    )
