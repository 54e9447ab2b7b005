"""Benchmarks in their own files: published definitions against slow ones, and files that are not theirs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from locus.audit import AuditSettings, audit
from locus.audit.context import Context
from locus.audit.metric_table import FIGURES
from locus.audit.state import State
from locus.audit.suites.membership import SCORES, membership_scores
from locus.audit.suites.muse import Muse, read_muse, text_before_stop
from locus.audit.suites.source import read_records
from locus.audit.suites.table import SUITES, load_suite
from locus.audit.suites.tofu import Tofu, read_tofu
from locus.errors import InputError
from locus.model import Model
from tests.locus.audit.audit_model import TEXT, knowing, never_knew
from tests.tiny import tiny_model


def _question(i: int) -> dict[str, Any]:
    cities = ["Paris", "Berlin", "Rome", "Italy"]
    return {
        "question": f"Where is house {i}?",
        "answer": cities[i % 4],
        "paraphrased_answer": f"in {cities[i % 4]}",
        "perturbed_answer": [f"in {cities[(i + 1) % 4]}", f"in {cities[(i + 2) % 4]}"],
    }


@pytest.fixture
def tofu_folder(tmp_path: Path) -> Path:
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        lines = "\n".join(json.dumps(_question(i)) for i in range(5))
        (tmp_path / f"{name}_perturbed.json").write_text(lines + "\n")
    return tmp_path


def _context(model: Model, never: Model | None = None) -> Context:
    reference = None if never is None else State("never knew", "edit", never)
    return Context(State("base", "base", model), [], [], {}, never_knew=reference)


def _slow_loss(model: Model, question: str, answer: str) -> float:
    """Mean negative log-likelihood of the answer's tokens, one whole forward."""
    prompt = f"Question: {question}\nAnswer:"
    ids = model.tokenizer(f"{prompt} {answer}").input_ids
    start = len(model.tokenizer(prompt).input_ids)
    with torch.no_grad():
        logprobs = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)


def test_tofu_is_its_definition(tofu_folder: Path) -> None:
    """Truth ratio and probability of every question, computed one forward at a time."""
    model = tiny_model("llama", seed=1)
    suite = read_tofu(tofu_folder)
    forget, options = suite.score(model, "forget"), suite.score(model, "world_facts")
    for i in range(5):
        q = _question(i)
        right, paraphrased = (
            _slow_loss(model, q["question"], q[k]) for k in ("answer", "paraphrased_answer")
        )
        wrong = [_slow_loss(model, q["question"], a) for a in q["perturbed_answer"]]
        assert forget.prob[i].item() == pytest.approx(math.exp(-right), rel=1e-4)
        assert forget.truth_ratio[i].item() == pytest.approx(math.exp(paraphrased - sum(wrong) / 2), rel=1e-4)
        among = math.exp(-right) / (math.exp(-right) + sum(math.exp(-w) for w in wrong))
        assert options.prob[i].item() == pytest.approx(among, rel=1e-4)


def test_tofus_aggregates(tofu_folder: Path) -> None:
    model = tiny_model("llama", seed=1)
    suite = Tofu(read_tofu(tofu_folder).sets, max_new_tokens=3)
    alone = suite.run(State("s", "edit", model), _context(model))
    assert "tofu.forget_quality" not in alone.scalars, "no retrained model, no forget quality"
    assert 0 <= alone.scalars["tofu.model_utility"] <= 1
    same = suite.run(State("s", "edit", model), _context(model, model))
    assert same.scalars["tofu.forget_quality"] == pytest.approx(1)
    assert {*same.items, *same.scalars} == set(suite.figures)
    assert len(suite.facts) == 5 and all(f.alternatives for f in suite.facts) and suite.retain[0].held_out


def test_tofu_without_the_other_sets_has_no_utility(tofu_folder: Path) -> None:
    (tofu_folder / "retain_perturbed.json").unlink()
    suite = Tofu(read_tofu(tofu_folder, limit=2).sets, max_new_tokens=2)
    found = suite.run(State("s", "edit", knowing()), _context(knowing()))
    assert "tofu.model_utility" not in found.scalars and len(found.items["tofu.probability"].values) == 2


@pytest.fixture
def muse_folder(tmp_path: Path) -> Path:
    qa = [{"question": f"Where is house {i}?", "answer": ["Rome", "in Rome"]} for i in range(3)]
    files = {
        "verbmem/forget": [{"prompt": line[:20], "gt": line[20:]} for line in TEXT[:3]],
        "knowmem/forget_qa": qa,
        "knowmem/retain_qa": qa,
        "knowmem/forget_qa_icl": qa[:1],
        "privleak/forget": [{"text": line} for line in TEXT],
        "privleak/holdout": [{"text": f"nobody {line[::-1]} said"} for line in TEXT],
    }
    for name, records in files.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records))
    return tmp_path


def test_muse_sees_members_and_leakage_needs_a_retrained_model(
    muse_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locus.audit.suites.muse.VERBMEM_TOKENS", 30)
    monkeypatch.setattr("locus.audit.suites.muse.KNOWMEM_TOKENS", 4)
    suite = read_muse(muse_folder)
    found = suite.run(State("s", "edit", knowing()), _context(knowing()))
    assert found.scalars["muse.privacy_auc"] < 0.2, "texts it was taught look like members"
    assert found.scalars["membership.loss"] > 0.8
    assert "muse.privleak" not in found.scalars and "membership.reference" not in found.scalars
    stranger = tiny_model("llama", num_hidden_layers=2)
    full = suite.run(State("s", "edit", knowing()), _context(knowing(), stranger))
    assert {*full.items, *full.scalars} == set(suite.figures)
    assert full.scalars["muse.privleak"] < 0, "forgotten too little"
    itself = suite.run(State("s", "edit", stranger), _context(knowing(), stranger))
    assert itself.scalars["muse.privleak"] == pytest.approx(0)
    memory = "muse.verbmem_f"
    assert found.items[memory].values.mean() > itself.items[memory].values.mean() + 0.05


def test_membership_scores_against_whole_forwards() -> None:
    model = knowing()
    scores = membership_scores(model, TEXT[:3], 1.0, reference=never_knew(), max_tokens=20)
    assert set(scores) == set(SCORES)
    for i, line in enumerate(TEXT[:3]):
        ids = torch.tensor([model.tokenizer(line).input_ids])
        with torch.no_grad():
            logprobs = model.module(ids).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, ids[0, 1:, None])
        assert scores["loss"][i] == pytest.approx(own.mean().item(), rel=1e-4)
        assert scores["min_k"][i] == pytest.approx(scores["loss"][i])


def test_a_generation_is_cut_at_the_first_stop() -> None:
    assert (
        text_before_stop(" Rome\n\nQuestion: x") == " Rome"
        and text_before_stop(" Rome") == " Rome"
        and text_before_stop("Question: a") == ""
    )


def test_wmdp_by_letter(tmp_path: Path) -> None:
    record = {"question": "Which city?", "choices": ["Rome", "Paris", "Berlin", "Bonn"], "answer": 2}
    (tmp_path / "bio.jsonl").write_text(json.dumps(record) + "\n")
    suite = load_suite("wmdp", tmp_path)
    assert suite.facts[0].target == " Berlin" and suite.facts[0].alternatives == (" Rome", " Paris", " Bonn")
    found = suite.run(State("s", "edit", knowing()), _context(knowing()))
    text = "The following are multiple choice questions (with answers).\n\nWhich city?\n"
    text += "A. Rome\nB. Paris\nC. Berlin\nD. Bonn\nAnswer:"
    ids = torch.tensor([knowing().tokenizer(text).input_ids])
    letters = [knowing().tokenizer(f"{text} {c}").input_ids[len(ids[0]) :] for c in "ABCD"]
    with torch.no_grad():
        logprobs = (
            knowing()
            .module(torch.cat([ids, torch.zeros(1, 0, dtype=torch.long)], 1))
            .logits[0, -1]
            .log_softmax(-1)
        )
    if all(len(letter) == 1 for letter in letters):
        best = max(range(4), key=lambda i: float(logprobs[letters[i][0]]))
        assert found.items["wmdp.accuracy"].values.tolist() == [float(best == 2)]
    assert len(found.items["wmdp.accuracy"].values) == 1


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("tofu", "forget01_perturbed.json", "", "empty suite"),
        ("tofu", "nothing.json", "[]", "no forget01_perturbed.json"),
        (
            "tofu",
            "forget01_perturbed.json",
            '{"question": "a", "answer": "b"}',
            "no field 'perturbed_answer'",
        ),
        ("tofu", "forget01_perturbed.json", "{not json", "not JSON"),
        ("muse", "other.json", "[]", "none of verbmem/forget.json"),
        ("wmdp", "a.json", '[{"question": "a", "choices": ["b"], "answer": 0}]', "needs 2 to 10 choices"),
        ("wmdp", "a.txt", "", "no .json or .jsonl"),
        ("glue", "a.json", "[]", "no suite 'glue'"),
    ],
)
def test_what_is_not_the_benchmark_is_refused(
    tmp_path: Path, name: str, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_suite(name, tmp_path)


def test_an_audit_with_a_suite_shows_what_it_could_not_measure(tofu_folder: Path, tmp_path: Path) -> None:
    suite = Tofu(read_tofu(tofu_folder, limit=3).sets, max_new_tokens=2)
    settings = AuditSettings(attacks=("depth",))
    asked = {(fact.prompt, fact.target) for fact in suite.facts}
    retain = [fact for fact in suite.retain if (fact.prompt, fact.target) not in asked]
    done = audit(knowing(), {"edit": never_knew()}, suite.facts, retain, settings=settings, suites=[suite])
    doc = done.document()
    edit = doc["states"][1]["figures"]
    assert edit["tofu.probability"]["n"] == 3 and edit["tofu.model_utility"]["low"] is None
    missing = {m["what"] for m in doc["missing"]}
    assert FIGURES["tofu.forget_quality"].label in missing and FIGURES["depth.erased"].label in missing
    assert "attack probe" in missing and "attack depth" not in missing


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 3000, "forget.json"),
        ('[{"question": ' + "1" * 6000 + "}]", "not usable JSON"),
        ('{"question": ' + "[" * 100_000, "not usable JSON"),
        ('{"question": "a", "question": "b"}', "given twice"),
        ("", "empty suite"),
    ],
    ids=["array in array", "long number", "deep nesting", "twice", "empty"],
)
def test_hostile_files_are_refused_as_fact_files_are(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "forget.json"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        read_records(path, None, "question")


def test_the_suites_are_those_of_the_table(tmp_path: Path) -> None:
    assert set(SUITES) == {"facts", "counterfact", "tofu", "muse", "wmdp"}
    assert isinstance(Muse({}), object) and set(Muse({}).figures) <= set(FIGURES)


def test_the_harness_is_asked_in_memory_and_its_documents_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for lm-evaluation-harness with its own result format: one task, one metric a document, one for all."""
    import sys
    from types import ModuleType, SimpleNamespace

    from locus.audit.suites.harness import Harness

    asked: dict[str, Any] = {}

    class Manager:
        all_tasks = ("quiz",)

        def __init__(self, include_path: str | None) -> None:
            asked["folder"] = include_path

    def simple_evaluate(lm: Any, **kwargs: Any) -> dict[str, Any]:
        asked.update(kwargs, lm=lm)
        samples = [{"doc_id": 0, "acc": 1.0}, {"doc_id": 1, "acc": 0.0}]
        metrics = {
            "alias": "quiz",
            "acc,none": 0.5,
            "acc_stderr,none": 0.3,
            "perplexity,none": 7.0,
            "sample_len": 2,
        }
        return {"results": {"quiz": metrics}, "samples": {"quiz": samples}}

    class Spoken(SimpleNamespace):
        pass

    for name, parts in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": Manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **kwargs: Spoken(**kwargs)},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    suite = Harness(("quiz",), 2, Path("tasks"))
    found = suite.run(State("s", "edit", knowing()), _context(knowing()))
    assert asked["folder"] == "tasks" and asked["limit"] == 2 and asked["lm"].pretrained is knowing().module
    assert found.items["harness.quiz.acc"].values.tolist() == [1.0, 0.0]
    assert found.scalars == {"harness.quiz.perplexity": 7.0}
    with pytest.raises(InputError, match="has no such task"):
        Harness(("riddle",))


def test_figures_of_tasks_are_in_the_document_and_know_which_way_is_good() -> None:
    from locus.audit.metric_table import figure_of

    assert figure_of("harness.quiz.acc_norm").better == "higher"
    assert figure_of("harness.wikitext.word_perplexity").better == "lower"
    assert figure_of("forget.prob") is FIGURES["forget.prob"]
