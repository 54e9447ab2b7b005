"""An audit that was interrupted goes on, and takes up only what was measured of the same inputs with the same seed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from locus.audit import AuditSettings, audit
from locus.audit.attacks.table import ATTACKS
from locus.audit.figure_values import FigureValues
from locus.audit.settings import RelearnAttack, Standards
from locus.delta import WeightDelta
from locus.fact import Example
from locus.finished_parts import FinishedParts
from tests.locus.audit.audit_model import TEXT, facts, knowing, never_knew

NAMES = ("prompts", "choice", "generation")
QUICK = AuditSettings(attacks=("lens", *NAMES), control_attacks=(), text_tokens=64)
TIMES = ("seconds", "processor_seconds", "versions")


class Interrupted(Exception):
    """What ends a run in these tests."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The attacks that are run from now on, by name and state; the edit's "generation" can be made to fail."""
    seen: list[tuple[str, str]] = []
    for name in NAMES:
        run, what = ATTACKS[name]

        def counting(state: Any, context: Any, name: str = name, run: Any = run) -> FigureValues:
            if fails and (name, state.name) == ("generation", "edited"):
                raise Interrupted
            seen.append((name, state.name))
            found: FigureValues = run(state, context)
            return found

        monkeypatch.setitem(ATTACKS, name, (counting, what))  # type: ignore[arg-type]
    return seen


fails: list[bool] = []


def run(folder: Path | None, resume: bool = False, settings: AuditSettings = QUICK, **changes: Any) -> Any:
    forget, retain = facts()
    forget = [dataclasses.replace(fact, alternatives=(" Madrid", " London")) for fact in forget[:4]]
    given = {"facts": forget, "retain": retain, "text": TEXT, "settings": settings} | changes
    base = given.pop("base", None) or knowing()
    edits = {"edited": given.pop("edit", None) or WeightDelta.between(base.module, never_knew().module)}
    parts = None if folder is None else FinishedParts.open(folder, resume)
    return audit(base, edits, **given, finished=parts)


def said(done: Any) -> Any:
    """The document without what differs from run to run."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if key not in TIMES}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(done.document())


def test_an_interrupted_audit_goes_on_to_the_same_document(tmp_path, counted):
    whole = said(run(None))
    everything = list(counted)
    counted.clear()
    fails.append(True)
    try:
        with pytest.raises(Interrupted):
            run(tmp_path / "parts")
    finally:
        fails.clear()
    assert counted == everything[:-1], "the edit's last attack was interrupted"
    counted.clear()
    assert said(run(tmp_path / "parts", resume=True)) == whole
    assert counted == [("generation", "edited")]
    counted.clear()
    assert said(run(tmp_path / "parts", resume=True)) == whole
    assert counted == []
    run(tmp_path / "parts")
    assert counted == everything, "without resume nothing is taken up"


def test_another_attack_and_other_lines_cost_only_themselves(tmp_path, counted):
    run(tmp_path, settings=dataclasses.replace(QUICK, attacks=("prompts",)))
    counted.clear()
    lines = Standards(min_facts=3)
    more = dataclasses.replace(QUICK, attacks=("prompts", "choice"), standards=lines)
    done = run(tmp_path, resume=True, settings=more)
    assert counted == [("choice", "base"), ("choice", "edited")]
    assert said(done) == said(run(None, settings=more))


CHANGES: dict[str, Any] = {
    "seed": lambda: {"settings": dataclasses.replace(QUICK, seed=1)},
    "relearn": lambda: {"settings": dataclasses.replace(QUICK, relearn=RelearnAttack(seed=1))},
    "batch": lambda: {"settings": dataclasses.replace(QUICK, max_tokens=300)},
    "held out": lambda: {"retain": [dataclasses.replace(f, held_out=not f.held_out) for f in facts()[1]]},
    "neighbours": lambda: {
        "facts": [dataclasses.replace(facts()[0][0], neighbours=(Example("Rome is in", " Italy"),))]
    },
    "chat": lambda: {"base": dataclasses.replace(_chatting(), chat=True)},
    "bos": lambda: {"base": dataclasses.replace(knowing(), bos=5)},
    "never knew": lambda: {"never_knew": never_knew()},
}


def _chatting() -> Any:
    model = copy.deepcopy(knowing())
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_other_inputs_are_measured_anew(name, tmp_path, counted):
    quick = dataclasses.replace(QUICK, attacks=("prompts",))
    run(tmp_path, settings=quick)
    counted.clear()
    change = CHANGES[name]()
    if "settings" in change:
        change["settings"] = dataclasses.replace(change["settings"], attacks=("prompts",))
    run(tmp_path, resume=True, **({"settings": quick} | change))
    assert {("prompts", "base"), ("prompts", "edited")} <= set(counted)


def test_another_delta_is_measured_anew_and_the_base_is_not(tmp_path, counted):
    quick = dataclasses.replace(QUICK, attacks=("prompts",))
    run(tmp_path, settings=quick)
    counted.clear()
    base, other = knowing(), copy.deepcopy(never_knew())
    name = next(iter(WeightDelta.between(base.module, other.module).changes))
    kept = dict(base.module.named_parameters())
    with torch.no_grad():
        for key, parameter in other.module.named_parameters():
            if key != name:
                parameter.copy_(kept[key])
    run(tmp_path, resume=True, settings=quick, edit=WeightDelta.between(base.module, other.module))
    assert counted == [("prompts", "edited")]
