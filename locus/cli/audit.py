"""`locus audit`: what was forgotten, what survived, what came back, beside controls."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from locus.cli.edit.controls import why_no_controls
from locus.cli.edit.edit_data import retained
from locus.cli.options import Loading, MethodTokens, Running, Talking, method_settings
from locus.errors import InputError

if TYPE_CHECKING:
    from locus.audit import Audit, AuditSettings
    from locus.audit.gate import GateResult
    from locus.audit.suites.table import Suite
    from locus.delta import WeightDelta
    from locus.fact import Fact
    from locus.finished_parts import FinishedParts
    from locus.model import Model


def audit(
    base: str,
    edited: str,
    facts: str,
    /,
    *tokens: MethodTokens,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    retain: str | None = None,
    suite: str = "facts",
    attacks: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    never_knew: str | None = None,
    control: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    mask: Path | None = None,
    text: Path | None = None,
    tasks: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    tasks_limit: int | None = None,
    tasks_folder: Path | None = None,
    gate: Path | None = None,
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> int:
    """Judge an edit: what was forgotten, what survived, what came back, beside controls.

    Exit 3 if a gate was given and is not met. Started by torchrun, several processes share the base, the edit and the
    controls. With --resume an audit that was interrupted goes on: each state, attack and suite that is finished is
    kept in the folder `parts`, and an attack added later costs only itself. `locus methods audit` shows the attacks and
    the further settings.

    Args:
        base: The model before the edit: checkpoint folder, hub id, or smollm2.
        edited: What to judge: the folder of `locus edit` (its controls are judged with it), a
            delta.safetensors, or a checkpoint folder.
        facts: What had to go: a fact file, or demo-forget. With --suite: that benchmark's file or folder, or
            hf://owner/dataset (the cache alone where HF_HUB_OFFLINE is set).
        out: Folder for audit.json and report.html.
        retain: What had to stay: a fact file, demo-retain, or neighbours where the edit was given those; held_out
            facts, and neighbours that are not in it, are the test of it.
        suite: What FACTS is: facts (any fact file), counterfact, tofu, muse or wmdp, with that benchmark's figures.
        attacks: Attacks by name, or all, or none; by default lens relearn rounding prompts strength.
        never_knew: A model retrained without the forget set: what an edit should come to. Forget quality,
            PrivLeak and the depth score need it.
        control: Further controls: the same edit with a random mask of equal size, given like EDITED. With those beside
            the edit there must be at least 5 for a verdict on whether the place mattered.
        mask: The mask the edit had to keep to; changes outside it are counted. The default is the mask.safetensors
            in the folder EDITED, where an edit without a mask has kept its own.
        text: Neutral paragraphs; the default is a text that comes with locus. Every third is read: those
            that `locus edit` leaves out of training.
        tasks: Tasks of lm-evaluation-harness to run besides (pip install "locus-unlearn[harness]").
        tasks_limit: At most so many documents a task.
        tasks_folder: Folder with YAML files of further tasks.
        gate: A TOML file of thresholds and verdicts; exit 3 if one fails or its evidence is missing.
    """
    from locus.audit.gate import check_gate, read_gate
    from locus.audit.suites.harness import Harness
    from locus.audit.suites.table import load_suite
    from locus.fact import neutral_text, split_text
    from locus.finished_parts import FinishedParts
    from locus.input_digest import digest_of, input_digests
    from locus.parallel.map import together
    from locus.parallel.ranks import joined

    with joined() as ranks, together(ranks):
        talking = talking.of(ranks)
        if tasks and ranks.size > 1:
            raise InputError("locus audit --tasks runs in one process: start it without torchrun")
        wanted = None if gate is None else read_gate(gate)
        settings = audit_settings(tokens, attacks, running)
        judged_by = load_suite(suite, facts, running.limit)
        suites = [judged_by, *([Harness(tasks, tasks_limit, tasks_folder)] if tasks else [])]
        kept = [*judged_by.retain, *retained(judged_by.facts, retain)]
        _, unseen = split_text(neutral_text(text))
        loaded = loading.load(base)
        reference = None if never_knew is None else loading.load(never_knew)
        edits, asked = {"edited": edited}, (judged_by.facts, kept, unseen, settings, loading, mask)
        given = input_digests(loaded, facts={"facts": judged_by.facts, "retain": kept}, settings=settings)
        ranks.agree("models, facts or settings", digest_of(given))
        with ranks.hold(out), talking.progress():
            finished = FinishedParts.open(out / "parts", running.resume, ranks)
            done = audit_edits(
                loaded, edits, control, *asked, never_knew=reference, suites=suites, finished=finished
            )
            written = write_audit(done, out) if ranks.first else {}
        results = [] if wanted is None else check_gate(done, wanted)
        if ranks.first:
            gated = [dataclasses.asdict(r) for r in results]
            talking.finish({**written, "gate": gated}, _table(done, out, results))
        return 0 if all(r.passed for r in results) else 3


def audit_settings(tokens: Sequence[str], attacks: tuple[str, ...], running: Running) -> AuditSettings:
    """The settings of the audit's own options on the command line, with the attacks named, all of which there are."""
    from locus.audit import AuditSettings
    from locus.audit.attacks.table import attacks_of

    shared = {"max_tokens": running.batch_tokens, "seed": running.seed}
    settings = method_settings("locus audit", AuditSettings, tokens, shared)
    named = attacks_of(attacks or settings.attacks)
    return dataclasses.replace(settings, attacks=named) if attacks else settings


def audit_edits(
    model: Model,
    edits: Mapping[str, str],
    controls: Sequence[str],
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    text: Sequence[str],
    settings: AuditSettings,
    loading: Loading,
    mask: Path | None,
    never_knew: Model | None = None,
    suites: Sequence[Suite] = (),
    finished: FinishedParts | None = None,
) -> Audit:
    """Measure edits and controls given by path; an edit's own controls come with it."""
    from locus.audit import audit as judge
    from locus.mask import WeightMask

    judged = {name: read_state(path, loading) for name, path in edits.items()}
    beside: dict[str, WeightDelta | Model] = {}
    own = [str(folder) for path in edits.values() for folder in sorted(Path(path).glob("control-*"))]
    for path in dict.fromkeys([*own, *controls]):
        beside[f"control {len(beside) + 1}"] = read_state(path, loading)
    kept_to = {name: mask or own_mask(path) for name, path in edits.items()}
    masks = {name: WeightMask.load(path) for name, path in kept_to.items() if path is not None}
    done = judge(
        model,
        judged,
        forget,
        retain,
        text,
        controls=beside,
        masks=masks,
        never_knew=never_knew,
        suites=suites,
        settings=settings,
        finished=finished,
    )
    refused = {name: why for name, path in edits.items() if (why := why_no_controls(Path(path)))}
    said = [{"what": f"controls of {name}", "why": why} for name, why in refused.items()]
    notes = [note for name, path in edits.items() if (note := _other_form(name, path, model))]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return dataclasses.replace(done, missing=(*done.missing, *said), notes=(*done.notes, *notes))


def own_mask(path: str) -> Path | None:
    """The mask that an edit's folder keeps beside its delta."""
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    found = folder / "mask.safetensors"
    return found if found.is_file() and (folder / "edit.json").is_file() else None


def _other_form(name: str, path: str, model: Model) -> str | None:
    """What to say where an edit was made in another form (chat or plain) than it is audited in."""
    from locus.files.artefact import load_json

    place = Path(path)
    about = (place if place.is_dir() else place.parent) / "edit.json"
    if not about.is_file():
        return None
    chat = bool(load_json(about, "edit").get("chat", False))
    if chat == model.chat:
        return None
    made, asked = ("in conversation (--chat)", "plainly") if chat else ("plainly", "in conversation (--chat)")
    return f"{name} was edited {made} and is audited {asked}: the figures say little of what it was made for"


def write_audit(done: Audit, folder: Path) -> dict[str, Any]:
    """Write audit.json and report.html; returns what the command prints as JSON."""
    from locus.report import audit_report

    done.save(folder)
    report = audit_report(done, folder)
    document = done.document()
    return {
        "audit": str(folder / "audit.json"),
        "report": str(report),
        "headline": document.get("headline"),
        "states": document.get("states"),
    }


def read_state(path: str, loading: Loading) -> WeightDelta | Model:
    """A delta (its file, or the folder of an edit), or else a checkpoint loaded beside the base."""
    from locus.delta import WeightDelta

    place = Path(path)
    if place.is_dir() and (place / "delta.safetensors").is_file():
        return WeightDelta.load(place / "delta.safetensors")
    if place.suffix == ".safetensors":
        return WeightDelta.load(place)
    if place.is_dir() and (place / "edit.json").is_file():
        raise InputError(f"{path}: holds an edit.json but no delta.safetensors; run `locus edit` again")
    return loading.load(path)


def _table(done: Audit, folder: Path, gate: Sequence[GateResult]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from locus.report import terminal_table

    lines = [
        Text(
            f"gate {'passed' if r.passed else 'FAILED'}  {r.edit}: {r.what}: wanted {r.wanted}, found {r.found}"
        )
        for r in gate
    ]
    return Group(terminal_table(done), *lines, Text(f"the evidence: {folder / 'report.html'}"))
