"""The audit: the base, the edits and the controls through the same questions and attacks."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from locus.audit.attacks.generation import greedy_continuations, said_figures, sentence_figures
from locus.audit.attacks.lens import look_inside
from locus.audit.attacks.relearn import relearn
from locus.audit.attacks.rounding import survive_rounding
from locus.audit.attacks.table import ATTACKS, BUILT_IN, FIGURES_OF, WHY_NOT, attack_all, attacks_of
from locus.audit.context import Context, batch_tokens
from locus.audit.document import document
from locus.audit.figure_values import FigureValues
from locus.audit.findings import Findings
from locus.audit.intervals import Items
from locus.audit.measurement import Measurement
from locus.audit.metric_table import FIGURES
from locus.audit.neutral_text import TextScores, read_text
from locus.audit.questions import Answers, Questions, ask, grid_questions, questions_of, split_facts, subset
from locus.audit.settings import AuditSettings, Standards
from locus.audit.state import State, states_of
from locus.audit.suites.table import Suite
from locus.audit.weight_change import WeightChange, change_of
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.files.artefact import load_json, save_json
from locus.finished_parts import FinishedParts
from locus.input_digest import input_digests
from locus.mask import WeightMask
from locus.model import Model
from locus.parallel.map import each_value
from locus.tokens import Encoded, encode, encode_text

KIND = "audit"


@dataclass(frozen=True)
class Audit(Findings):
    """Every state measured on the same items, as a document and on the disk."""

    def document(self) -> dict[str, Any]:
        """The audit as JSON values; SCHEMA.md beside this file says what each field is."""
        return self._document

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self)

    def save(self, folder: str | Path) -> Path:
        """Write audit.json into a folder, atomically; returns its path."""
        path = Path(folder) / "audit.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, KIND, self.document())
        return path


def read_audit(path: str | Path) -> dict[str, Any]:
    """Read the document that `Audit.save` wrote; a folder means its audit.json.

    Raises:
        InputError: missing, damaged, of another kind or of a newer version.
    """
    path = Path(path)
    return load_json(path / "audit.json" if path.is_dir() else path, KIND)


def measure_model(
    state: State,
    questions: Mapping[str, Questions],
    settings: AuditSettings,
    text: TextScores | None = None,
    context: Context | None = None,
) -> Measurement:
    """Measure one model state: answers, what it writes, inner layers, rounding, relearning.

    Neutral text is read for all states together (`read_text`) and passed in. The base is not retaught:
    it has nothing to bring back.

    Args:
        state: Which weights.
        questions: By kind, from `ask_about`.
        settings: What to measure.
        text: This state's scores on neutral text, if it was read.
        context: What the further attacks of `settings.attacks` are given; None leaves them out.
    """
    start, spent = time.perf_counter(), time.process_time()
    attacks = _attacks(state, settings)
    if context is None:
        return replace(_asked(state, questions, settings, attacks), text=text)
    built_in = [name for name in attacks if name in BUILT_IN]
    one = context.finished.take(
        ["state", state.identity, built_in],
        Measurement,
        lambda: _asked(state, questions, settings, attacks),
    )
    context.answers[state.name] = one.answers
    if one.written:
        context.written[state.name] = one.written
    found = attack_all(attacks, state, context)
    return replace(
        one,
        text=text,
        extra={**one.extra, **found.items},
        scalars=found.scalars,
        curves=found.curves,
        seconds=max(one.seconds, time.perf_counter() - start),
        processor_seconds=max(one.processor_seconds, time.process_time() - spent),
    )


def _asked(
    state: State, questions: Mapping[str, Questions], settings: AuditSettings, attacks: tuple[str, ...]
) -> Measurement:
    """The state's answers, and the attacks whose measurements have a place of their own."""
    start, spent = time.perf_counter(), time.process_time()
    forget, budget = questions["forget"], batch_tokens(settings, state.model)
    with state.active() as model:
        answers = {kind: ask(model, q, budget) for kind, q in questions.items() if kind not in _PARTS}
        answers |= {
            kind: subset(answers["held_out"], questions, kind) for kind in _PARTS if kind in questions
        }
        spoken = state.role != "control"
        written, values = _speak(model, questions, answers, settings) if spoken else ((), {})
        leak = look_inside(model, forget, budget) if "lens" in attacks else None
        held_out = questions.get("held_out", Questions((), (), ()))
        formats = settings.rounding if "rounding" in attacks else ()
        survived = survive_rounding(model, forget, held_out, formats, budget)
        teach = "relearn" in attacks and state.role != "base" and len(forget) > 1
        curve = relearn(model, forget, settings.relearn, budget, answers["forget"]) if teach else None
    return Measurement(
        state.name,
        state.role,
        answers,
        None,
        leak,
        curve,
        survived,
        written,
        values,
        seconds=time.perf_counter() - start,
        processor_seconds=time.process_time() - spent,
    )


def _attacks(state: State, settings: AuditSettings) -> tuple[str, ...]:
    """What this state goes through; the controls only what they are compared on."""
    asked = attacks_of(settings.attacks)
    return tuple(a for a in asked if a in settings.control_attacks) if state.role == "control" else asked


MAX_REWORDED = 64
"""Other wordings that the model is let to answer in its own words, the first ones of a seeded order."""


def _speak(
    model: Model,
    questions: Mapping[str, Questions],
    answers: Mapping[str, Answers],
    settings: AuditSettings,
) -> tuple[tuple[str, ...], dict[str, Items]]:
    """What the model writes after each forget prompt, and the figures of that and of the other wordings."""
    forget, max_tokens = questions["forget"], batch_tokens(settings, model)
    written = greedy_continuations(model, forget)
    found = said_figures("forget", forget, written)
    found |= sentence_figures(model, forget, written, answers["forget"].token_prob.values, max_tokens)
    for kind in ("paraphrase", "unseen_way"):
        if kind in questions:
            generator = torch.Generator().manual_seed(settings.seed)
            order = torch.randperm(len(questions[kind]), generator=generator).tolist()
            asked = questions[kind].take(sorted(order[:MAX_REWORDED]))
            found |= said_figures(kind, asked, greedy_continuations(model, asked))
    return written, found


_PARTS = ("held_out_near", "held_out_far")


def ask_about(model: Model, facts: Sequence[Fact], retain: Sequence[Fact] = ()) -> dict[str, Questions]:
    """Encode all the questions of an audit, by kind; kinds without questions are absent.

    Raises:
        InputError: no facts, a repeated id, or a fact that cannot be encoded.
    """
    pairs = split_facts(facts, retain)
    found = {kind: questions_of(model, listed) for kind, listed in pairs.items() if listed}
    for kind, listed in grid_questions(facts, retain).items():
        if asked := [one for one in listed if _can_be_asked(model, one[1])]:
            found[kind] = questions_of(model, asked)
    return found


def _can_be_asked(model: Model, example: Example) -> bool:
    """Whether a question that no file wrote out can be tokenized as it should be."""
    try:
        encode(model, example)
    except InputError:
        return False
    return True


def audit(
    base: Model,
    edits: Mapping[str, WeightDelta | Model],
    facts: Sequence[Fact],
    retain: Sequence[Fact] = (),
    text: Sequence[str] = (),
    controls: Mapping[str, WeightDelta | Model] | None = None,
    *,
    masks: Mapping[str, WeightMask] | None = None,
    never_knew: Model | None = None,
    suites: Sequence[Suite] = (),
    settings: AuditSettings | None = None,
    before: Audit | None = None,
    finished: FinishedParts | None = None,
) -> Audit:
    """Measure the base, each edit and each control on the same questions and attacks.

    Inside `locus.parallel.map.together` several processes share the states.

    Args:
        base: The model before any edit. Deltas are applied to it and undone, bit for bit.
        edits: Name -> delta on the base, or a separately loaded checkpoint.
        facts: What had to be forgotten.
        retain: What had to stay; those marked `held_out` are the test of it.
        text: Neutral paragraphs.
        controls: Name -> the same edit with a random mask of equal size.
        masks: Name of an edit or control -> the mask it had to keep to.
        never_knew: A model retrained without the forget set: what forget quality, PrivLeak and the depth
            score compare with. Without it they are not measured.
        suites: Benchmarks to run too (see `locus.audit.suites.table`).
        settings: What is measured.
        before: An earlier audit of the same base, with the same questions and settings: what it measured of the
            base is taken over.
        finished: Where each finished part is kept, and taken from if an earlier run of the same inputs left it.

    Raises:
        InputError: nothing to audit, a name twice, a model that does not compare with the base, a fact
            that cannot be encoded.
    """
    start = time.perf_counter()
    settings, controls, masks = settings or AuditSettings(), controls or {}, masks or {}
    states = states_of(base, edits, controls, never_knew)
    if unknown := sorted(set(masks) - {state.name for state in states[1:]}):
        raise InputError(f"audit: a mask for {unknown[0]!r}, which is neither an edit nor a control")
    questions = ask_about(base, facts, retain)
    encoded = _pieces(base, text, settings)
    attacks_of(settings.attacks), attacks_of(settings.control_attacks)
    reference = next((state for state in states if state.role == "reference"), None)
    parts = (finished or FinishedParts()).of(_inputs(base, facts, retain, questions, settings, reference))
    context = Context(states[0], facts, retain, questions, settings, finished=parts, never_knew=reference)
    texts: Mapping[str, TextScores] = {}
    if encoded:
        about = ["text", [state.identity for state in states], encoded]
        read = partial(read_text, states, encoded, max_bytes=settings.max_bytes)
        texts = parts.take(about, TextScores, read)

    def measured_in(state: State) -> Measurement:
        if state.role == "base" and before is not None:
            one = _taken_over(before, base, questions, settings, suites)
            context.answers[state.name] = one.answers
            return replace(one, text=texts.get(state.name))
        one = measure_model(state, questions, settings, texts.get(state.name), context)
        return with_suites(one, state, suites, context)

    measured = list(each_value(states, measured_in, Measurement, "audit"))
    return Audit(
        base=measured[0],
        edits=tuple(m for m in measured if m.role == "edit"),
        controls=tuple(m for m in measured if m.role == "control"),
        reference=next((m for m in measured if m.role == "reference"), None),
        relations={f.id: f.relation for f in (*facts, *retain) if f.relation is not None},
        questions=questions,
        changes=_changes(base, states, masks),
        missing=tuple(_missing(questions, bool(encoded), bool(controls), settings, measured, suites)),
        settings=settings,
        model=_about(base),
        versions=_versions(),
        seconds=time.perf_counter() - start,
        inputs=input_digests(
            base,
            facts={"forget facts": facts, "retain facts": retain},
            settings=settings,
            neutral_text=tuple(text),
            suites=[type(suite).__name__ for suite in suites],
        ),
    )


def _inputs(
    base: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    questions: Mapping[str, Questions],
    settings: AuditSettings,
    reference: State | None,
) -> dict[str, Any]:
    """What every part of the audit depends on; which attacks are asked for, and the verdicts' lines, no part does."""
    alike = replace(settings, attacks=(), control_attacks=(), standards=Standards())
    return input_digests(
        base,
        facts={"facts": facts, "retain facts": retain},
        settings=alike,
        questions=questions,
        reference=None if reference is None else reference.identity,
    )


def _taken_over(
    before: Audit,
    base: Model,
    questions: Mapping[str, Questions],
    settings: AuditSettings,
    suites: Sequence[Suite],
) -> Measurement:
    """What an earlier audit measured of the base, if that was the same measurement."""
    same = before.settings == settings and before.model == _about(base) and before.questions == questions
    if not same or any(suite.figures for suite in suites):
        raise InputError("audit: the earlier audit is of another base, other questions, settings or suites")
    return before.base


def _changes(
    base: Model, states: Sequence[State], masks: Mapping[str, WeightMask]
) -> dict[str, WeightChange]:
    """What each edit and control did to the weights."""
    compared = [state for state in states if state.role in ("edit", "control")]
    return {
        s.name: change_of(base, s.model if s.delta is None else s.delta, masks.get(s.name)) for s in compared
    }


def _pieces(base: Model, text: Sequence[str], settings: AuditSettings) -> list[Encoded]:
    """Neutral text as encoded pieces, up to the settings' number of tokens."""
    pieces = [piece for paragraph in text for piece in encode_text(base, paragraph, settings.text_block)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    kept, n = set(), 0
    for i in order:
        if n < settings.text_tokens:
            kept.add(i)
            n += pieces[i].n_target
    return [piece for i, piece in enumerate(pieces) if i in kept]


def with_suites(one: Measurement, state: State, suites: Sequence[Suite], context: Context) -> Measurement:
    """The measurement with the figures of every suite added."""
    start = time.perf_counter()
    found = FigureValues(one.extra, one.scalars, one.curves)
    for suite in suites:
        run = partial(suite.run, state, context)
        if is_dataclass(suite):
            found |= context.finished.take(["suite", suite, state.identity], FigureValues, run)
        else:  # nothing says what it is made from
            found |= run()
    seconds = one.seconds + time.perf_counter() - start
    return replace(one, extra=found.items, scalars=found.scalars, curves=found.curves, seconds=seconds)


def _missing(
    questions: Mapping[str, Questions],
    text: bool,
    controls: bool,
    settings: AuditSettings,
    measured: Sequence[Measurement],
    suites: Sequence[Suite],
) -> list[dict[str, str]]:
    asked = attacks_of(settings.attacks)
    absent = {
        "paraphrases": ("paraphrase" in questions, "no forget fact has paraphrases"),
        "neighbours": ("neighbour" in questions, "no forget fact has neighbours"),
        "held-out facts": ("held_out" in questions, "no retain fact is marked held_out"),
        "near held-out facts": (
            "held_out_near" in questions,
            "no held-out fact shares a relation with a forget fact",
        ),
        "retained facts": ("retained" in questions, "no retain facts to train on were given"),
        "ways of asking that the edit did not see": (
            "unseen_way" in questions,
            "the files ask each forgotten fact in the ways given to the edit only, or name no subjects",
        ),
        "other facts of the same subjects": (
            "same_subject" in questions,
            "no retain fact kept from the edit has a subject of a forget fact under another relation",
        ),
        "other subjects of the same relations": (
            "same_relation" in questions,
            "no fact kept from the edit has a relation of a forget fact and another subject",
        ),
        "neutral text": (text, "no text was given"),
        "controls": (controls, "no control edits with random masks of equal size were given"),
        "the untaught half under relearning": (
            "relearn" not in asked or len(questions["forget"]) > 1,
            "fewer than two forget facts",
        ),
    }
    found = [{"what": what, "why": why} for what, (present, why) in absent.items() if not present]
    found += [
        {"what": f"attack {name}", "why": "not asked for (--attacks)"}
        for name in (*BUILT_IN, *ATTACKS)
        if name not in asked
    ]
    have = {key for m in measured for key in (*m.extra, *m.scalars)}
    expected = [key for name in asked for key in FIGURES_OF.get(name, ())]
    expected += [key for s in suites for key in s.figures]
    return found + [
        {"what": FIGURES[key].label, "why": WHY_NOT.get(key, "its data were not given or not usable")}
        for key in expected
        if key not in have
    ]


def _about(base: Model) -> dict[str, Any]:
    return {
        "name": base.name,
        "fingerprint": base.fingerprint,
        "architecture": base.atlas.architecture,
        "n_layers": base.atlas.n_layers,
        "n_parameters": sum(p.numel() for p in base.module.parameters()),
        "dtype": str(base.dtype).removeprefix("torch."),
        "bos": base.bos,
        "chat": base.chat,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("locus-unlearn", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
