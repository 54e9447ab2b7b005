"""The audit on a tiny model that knows its facts: it must see what is there, and never see what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from locus.audit import Audit, AuditSettings, RelearnAttack, audit, read_audit
from locus.audit.attacks.table import NAMES
from locus.audit.questions import split_facts
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Example, Fact, neighbours_of
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from locus.tokens import encode
from tests.locus.audit.audit_model import TEXT, facts, knowing, never_knew, noisy, scrambled, train
from tests.tiny import tiny_model

QUICK = AuditSettings(
    attacks=("lens", "relearn", "rounding"), relearn=RelearnAttack(at=(1, 2)), rounding=("int4",)
)
BARE = AuditSettings(attacks=("none",))


def judged(edit: WeightDelta | Model, **kwargs: Any) -> Audit:
    forget, retain = facts()
    return audit(knowing(), {"edit": edit}, forget, retain, TEXT, settings=QUICK, **kwargs)


def answers(done: Audit) -> dict[str, str]:
    return {v["question"]: v["answer"] for v in done.document()["verdicts"]["edit"]}


def test_an_edit_that_does_nothing_has_not_forgotten() -> None:
    done = judged(WeightDelta.between(knowing(), knowing()))
    said = answers(done)
    assert said["forgotten"] == said["general"] == "no"
    assert said["hidden"] == "no"
    assert said["spared"] == said["intact"] == "yes"
    assert said["returns"] == "unclear", "nothing was removed, so nothing can be said to stay away"
    assert said["localized"] == "not measured"
    assert torch.equal(done.edits[0].answers["forget"].nll, done.base.answers["forget"].nll)
    assert done.edits[0].text is not None and not done.edits[0].text.kl.any()
    assert done.document()["headline"]["edit"].startswith("Not forgotten")


def test_a_model_that_never_knew_has_forgotten_and_lost_nothing_else() -> None:
    done = judged(never_knew())
    said = answers(done)
    assert said["forgotten"] == said["general"] == "yes"
    assert said["spared"] == "yes"
    assert done.changes["edit"].n_changed > 0


def test_an_edit_that_only_puts_words_before_the_answer_has_not_forgotten() -> None:
    """The probability of the answer and the first choices say "gone"; the text that the model writes does not."""
    forget, retain = facts()
    evasive = noisy(knowing(), 0.0)
    detours = [Example(f.prompt, f" the city{f.target}") for f in forget]
    detours += [Example(e.prompt, f" the city{e.target}") for f in forget for e in f.paraphrase_examples]
    train(evasive, [encode(evasive, e) for e in (*detours, *(f.example for f in retain))], 25)
    done = judged(evasive)
    edit = done.edits[0]
    assert edit.answers["forget"].top1.values.sum() == 0 and edit.answers["forget"].prob.values.mean() < 0.05
    said = answers(done)
    assert said["forgotten"] == said["general"] == "no", "every answer is still written out"
    written = done.document()["facts"][0]["states"]["edit"]
    assert written["said"] and forget[0].target in written["written"]


def test_noise_on_all_weights_is_broken() -> None:
    said = answers(judged(noisy(knowing(), 1.0)))
    assert said["intact"] == "no"
    assert said["spared"] == "no"


def test_a_model_that_answers_nan_is_broken_and_the_report_can_still_be_written(tmp_path: Path) -> None:
    from locus.report import audit_report, terminal_table

    edit = noisy(knowing(), 0.0)
    with torch.no_grad():
        next(edit.module.parameters()).fill_(float("nan"))
    done = audit(
        knowing(),
        {"edit": edit},
        *facts(),
        TEXT,
        settings=BARE,
    )
    assert answers(done)["intact"] == "no"
    done.save(tmp_path)
    text = audit_report(done, tmp_path).read_text()
    assert "not finite" in text
    assert terminal_table(done).row_count > 5


def test_nothing_moves_and_a_delta_measures_as_the_checkpoint_it_makes() -> None:
    base, edited = knowing(), noisy(knowing(), 0.05)
    before = {name: p.clone() for name, p in base.module.named_parameters()}
    delta = WeightDelta.between(base, edited)
    one, other = judged(delta).edits[0], judged(edited).edits[0]
    for name, p in base.module.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad, name
    for kind in one.answers:
        torch.testing.assert_close(one.answers[kind].nll, other.answers[kind].nll)
    assert one.text is not None and other.text is not None
    torch.testing.assert_close(one.text.kl, other.text.kl)
    assert one.relearning is not None and other.relearning is not None
    torch.testing.assert_close(one.relearning.tested_prob, other.relearning.tested_prob, atol=1e-5, rtol=1e-4)


def test_what_was_not_measured_is_missing_and_never_a_pass() -> None:
    forget, _ = facts()
    bare = [replace(f, paraphrases=(), neighbours=(), relation=None) for f in forget]
    settings = BARE
    done = audit(knowing(), {"edit": never_knew()}, bare, settings=settings)
    said = answers(done)
    assert said["forgotten"] == "yes"
    assert {q for q, a in said.items() if a == "not measured"} == {
        "general",
        "spared",
        "intact",
        "hidden",
        "returns",
        "localized",
    }
    missing = {m["what"] for m in done.document()["missing"]}
    assert {f"attack {name}" for name in NAMES} <= missing
    assert {what for what in missing if not what.startswith("attack ")} == {
        "paraphrases",
        "neighbours",
        "held-out facts",
        "near held-out facts",
        "ways of asking that the edit did not see",
        "other facts of the same subjects",
        "other subjects of the same relations",
        "retained facts",
        "neutral text",
        "controls",
    }
    edit = next(s for s in done.document()["states"] if s["name"] == "edit")
    assert edit["figures"]["paraphrase.top1"] is None and edit["figures"]["text.kl"] is None


def test_too_few_facts_give_no_verdict() -> None:
    forget, retain = facts()
    done = audit(knowing(), {"edit": never_knew()}, forget[:3], retain[:3], TEXT[:2], settings=QUICK)
    assert answers(done)["forgotten"] == answers(done)["general"] == answers(done)["hidden"] == "unclear"


def test_facts_the_base_never_knew_give_no_verdict() -> None:
    forget, retain = facts()
    done = audit(never_knew(), {"edit": knowing()}, forget, retain, settings=AuditSettings(attacks=("lens",)))
    assert answers(done)["forgotten"] == "unclear"


def test_localization_is_judged_against_the_controls() -> None:
    """Five controls that forget as much by chance: none. Fewer give no verdict, and say how many it takes."""
    nothing = WeightDelta.between(knowing(), knowing())
    scattered = [scrambled(knowing(), never_knew(), seed) for seed in range(6)]
    controls = {f"control {i}": delta for i, delta in enumerate(scattered[:5])}
    forget, retain = facts()
    everything = audit(
        knowing(), {"edit": never_knew()}, forget, retain, TEXT, controls, settings=BARE
    ).document()
    gains = {c["key"]: c for c in everything["comparisons"] if c["against"] == "controls"}
    assert gains["held_out.top1"]["outcome"] == "better", "scrambled changes break the other facts"
    assert gains["text.kl"]["outcome"] == "better"
    (said,) = (v for v in everything["verdicts"]["edit"] if v["question"] == "localized")
    assert said["answer"] == "yes" and "5 random masks of equal size" in said["sentence"]
    random = audit(
        knowing(), {"edit": scattered[5]}, forget, retain, TEXT, controls, settings=BARE
    ).document()
    (said,) = (v for v in random["verdicts"]["edit"] if v["question"] == "localized")
    assert said["answer"] == "unclear" and "No difference from 5 random masks" in said["sentence"]
    few = audit(
        knowing(), {"edit": never_knew()}, forget, retain, TEXT, {"one": scattered[0]}, settings=BARE
    ).document()
    (said,) = (v for v in few["verdicts"]["edit"] if v["question"] == "localized")
    assert said["answer"] == "unclear" and "5 are needed" in said["sentence"]
    outcomes = {c["key"]: c["outcome"] for c in few["comparisons"] if c["against"] == "controls"}
    assert outcomes["forget.prob"] == "too few controls" and not {"better", "worse"} & set(outcomes.values())
    with pytest.raises(InputError, match="control 1 is edit itself, bit for bit"):
        judged(nothing, controls={"control 1": nothing})


def test_a_control_must_be_of_equal_size_and_another_edit() -> None:
    base, edited = knowing(), never_knew()
    delta, other = WeightDelta.between(base, edited), scrambled(base, edited, 0)
    name = next(iter(other.changes))
    part = WeightDelta(
        {name: other.changes[name]},
        {name: other.before[name]},
        {name: other.after[name]},
        "",
        {},
        other.rounding,
    )
    forget, retain = facts()
    done = audit(
        base, {"edit": delta}, forget, retain, controls={"small": part, "fair": other}, settings=BARE
    )
    document = done.document()
    ratios = {s["name"]: s["size_ratio"]["edit"] for s in document["states"] if s["role"] == "control"}
    assert ratios["fair"] == pytest.approx(1, abs=0.05) and ratios["small"] < 0.95
    assert any(
        m["what"] == "small beside edit" and "no control of equal size" in m["why"]
        for m in document["missing"]
    )
    alone = audit(base, {"edit": delta}, forget, retain, controls={"small": part}, settings=BARE).document()
    assert not [c for c in alone["comparisons"] if c["against"] == "controls"]
    for controls, message in (
        ({"copy": WeightDelta.between(base, edited)}, "copy is edit itself"),
        ({"copy": edited}, "copy is edit itself"),
        ({"a": other, "b": scrambled(base, edited, 0)}, "b is a itself"),
    ):
        with pytest.raises(InputError, match=message):
            audit(base, {"edit": delta}, forget, retain, controls=controls, settings=BARE)


def test_changes_off_the_mask_are_counted() -> None:
    base = knowing()
    name = base.atlas.neurons[0][-1].param
    weight = base.module.get_parameter(name)
    shape = tuple(weight.shape)
    edited = weight.clone()
    edited[1] += 1
    edited[2, :3] += 1
    delta = WeightDelta.between(base, {name: edited})
    mask = WeightMask({name: Selection("rows", torch.tensor([1]), shape)})
    settings = BARE
    forget, retain = facts()
    done = audit(base, {"edit": delta}, forget, retain, masks={"edit": mask}, settings=settings)
    change = done.changes["edit"].to_json()
    assert change["n_changed"] == shape[1] + 3
    assert change["off_mask"] == 3
    assert change["norm"] == pytest.approx((shape[1] + 3) ** 0.5, rel=1e-5)
    unknown = audit(base, {"edit": delta}, forget, settings=settings).changes["edit"]
    assert unknown.off_mask is None


def test_the_document_is_plain_json_and_comes_back_as_it_was(tmp_path: Path) -> None:
    done = judged(never_knew())
    path = done.save(tmp_path)
    document = done.document()
    assert read_audit(tmp_path) == read_audit(path)
    back = read_audit(path)
    assert {key: back[key] for key in document} == json.loads(json.dumps(document, allow_nan=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"edits": {}}, "no edit to audit"),
        (lambda a: a | {"facts": []}, "forget set is empty"),
        (lambda a: a | {"facts": a["facts"] + a["facts"][:1]}, "have the id 'home-Ann'"),
        (lambda a: a | {"edits": {"base": never_knew()}}, "'base' is given twice"),
        (lambda a: a | {"edits": {"edit": tiny_model("gpt2")}}, "architecture is"),
        (lambda a: a | {"edits": {"edit": tiny_model("llama", num_hidden_layers=1)}}, "n_layers is 1"),
        (lambda a: a | {"masks": {"nobody": WeightMask({})}}, "neither an edit nor a control"),
        (lambda a: a | {"edits": {"edit": replace(never_knew(), bos=None)}}, "starts texts with token None"),
    ],
)
def test_what_cannot_be_audited_is_refused(change: Any, message: str) -> None:
    forget, retain = facts()
    arguments: dict[str, Any] = {
        "base": knowing(),
        "edits": {"edit": never_knew()},
        "facts": forget,
        "retain": retain,
    }
    with pytest.raises(InputError, match=message):
        audit(**change(arguments), settings=BARE)


def test_a_model_with_other_tokens_is_refused() -> None:
    other = noisy(knowing(), 0.0)
    import copy

    tokenizer = copy.deepcopy(other.tokenizer)
    tokenizer.add_tokens(["<extra>"])
    forget, _ = facts()
    with pytest.raises(InputError, match="tokenizer has other tokens"):
        audit(knowing(), {"edit": replace(other, tokenizer=tokenizer)}, forget)


def test_a_retrained_model_stands_beside_the_edits_and_feeds_the_depth_score(tmp_path: Path) -> None:
    from locus.report import audit_report, terminal_table

    settings = AuditSettings(attacks=("lens", "depth"))
    half = noisy(knowing(), 0.05)
    forget, retain = facts()
    done = audit(knowing(), {"edit": half}, forget, retain, TEXT, never_knew=never_knew(), settings=settings)
    doc = done.document()
    assert [s["role"] for s in doc["states"]] == ["base", "edit", "reference"]
    assert doc["states"][2]["figures"]["forget.top1"]["mean"] < 0.3
    assert doc["states"][1]["figures"]["depth.erased"] is not None
    assert {r["relation"]: r["near"] for r in doc["relations"]} == {"home": True, "birth": False}
    assert sum(r["n"] for r in doc["relations"]) == doc["data"]["held_out"]
    assert "never knew" in audit_report(done, tmp_path).read_text()
    assert len(terminal_table(done).columns) == 4


def test_neighbours_that_were_trained_on_are_not_asked() -> None:
    near = tuple(Example(f"{name} is the capital of", " France") for name in ("Paris", "Lyon", "Nice"))
    fact = Fact("berlin", "Berlin is the capital of", " Germany", neighbours=near)
    assert [e.prompt for _, e in split_facts([fact], [])["neighbour"]] == [e.prompt for e in near]
    kept = neighbours_of([fact])
    assert [f.held_out for f in kept] == [False, False, True]
    assert [e.prompt for _, e in split_facts([fact], kept)["neighbour"]] == ["Nice is the capital of"]
