"""The audit: the base, the edits and the controls through the same questions and attacks."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from locus.artefact import load_json, save_json
from locus.audit.answers import Questions, ask, questions_of, split_facts, subset
from locus.audit.attacks import ATTACKS, FIGURES_OF, WHY_NOT, attack_all, attacks_of
from locus.audit.change import Change, change_of
from locus.audit.context import Context
from locus.audit.document import document
from locus.audit.figure import FIGURES
from locus.audit.leak import look_inside
from locus.audit.measurement import Measurement
from locus.audit.relearn import RelearnAttack, relearn
from locus.audit.rounding import FORMATS, Format, survive_rounding
from locus.audit.state import State, states_of
from locus.audit.suites import Suite
from locus.audit.text import TextScores, read_text
from locus.audit.verdict import Standards
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model
from locus.progress import task
from locus.tokens import Encoded, encode_text

KIND = "audit"


@dataclass(frozen=True)
class AuditSettings:
    """What is measured and how."""

    lens: bool = True
    """Read every layer through the logit lens."""
    lens_k: tuple[int, ...] = (4, 10)
    """Sizes of the top and bottom that count as a leak."""
    relearn: RelearnAttack | None = field(default_factory=RelearnAttack)
    """The relearning attack; None leaves it out."""
    rounding: tuple[Format, ...] = FORMATS
    """Weight formats to round to; empty leaves it out."""
    attacks: tuple[str, ...] = ()
    """Further attacks by name (see `locus.audit.attacks`), or "all"; each costs a pass or more a state."""
    text_block: int = 256
    """Longest piece of neutral text, in tokens."""
    text_tokens: int = 2048
    """Neutral text is read up to about so many tokens; whole paragraphs, spread over what was given."""
    max_tokens: int = 4096
    """Batch size in tokens."""
    max_bytes: int = 1 << 30
    """Memory for the base's log-probabilities on neutral text."""
    standards: Standards = field(default_factory=Standards)
    """The lines between the verdicts."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Audit:
    """Every state measured on the same items."""

    base: Measurement
    edits: tuple[Measurement, ...]
    controls: tuple[Measurement, ...]
    reference: Measurement | None
    """A model retrained without the forget set, where one was given."""
    relations: Mapping[str, str]
    """Fact id -> relation, of the facts that have one."""
    questions: Mapping[str, Questions]
    changes: Mapping[str, Change]
    """What the weights of each edit and control changed, by state."""
    missing: tuple[Mapping[str, str], ...]
    """What was not measured, and why."""
    settings: AuditSettings
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Base, edits, controls, reference."""
        reference = () if self.reference is None else (self.reference,)
        return (self.base, *self.edits, *self.controls, *reference)

    def document(self) -> dict[str, Any]:
        """The audit as JSON values; see `locus.audit.document` for the schema."""
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
    """Measure one model state: answers, inner layers, rounding, relearning.

    Neutral text is read for all states together (`read_text`) and passed in. The base is not attacked:
    it has nothing to bring back.

    Args:
        state: Which weights.
        questions: By kind, from `ask_about`.
        settings: What to measure.
        text: This state's scores on neutral text, if it was read.
        context: What the further attacks of `settings.attacks` are given; None leaves them out.
    """
    start = time.perf_counter()
    forget, budget = questions["forget"], settings.max_tokens
    with state.active() as model:
        answers = {kind: ask(model, q, budget) for kind, q in questions.items() if kind not in _PARTS}
        answers |= {
            kind: subset(answers["held_out"], questions, kind) for kind in _PARTS if kind in questions
        }
        leak = look_inside(model, forget, budget) if settings.lens else None
        held_out = questions.get("held_out", Questions((), (), ()))
        survived = survive_rounding(model, forget, held_out, settings.rounding, budget)
        attack = settings.relearn if state.role in ("edit", "control") and len(forget) > 1 else None
        curve = None if attack is None else relearn(model, forget, attack, budget)
    extra = {} if context is None else attack_all(attacks_of(settings.attacks), state, context)
    seconds = time.perf_counter() - start
    return Measurement(state.name, state.role, answers, text, leak, curve, survived, extra, seconds=seconds)


_PARTS = ("held_out_near", "held_out_far")


def ask_about(model: Model, facts: Sequence[Fact], retain: Sequence[Fact] = ()) -> dict[str, Questions]:
    """Encode all the questions of an audit, by kind; kinds without questions are absent.

    Raises:
        InputError: no facts, a repeated id, or a fact that cannot be encoded.
    """
    pairs = split_facts(facts, retain)
    return {kind: questions_of(model, listed) for kind, listed in pairs.items() if listed}


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
) -> Audit:
    """Measure the base, each edit and each control on the same questions and attacks.

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
        suites: Benchmarks to run besides (see `locus.audit.suites`).
        settings: What is measured.

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
    attacks_of(settings.attacks)
    reference = next((state for state in states if state.role == "reference"), None)
    context = Context(states[0], facts, retain, questions, settings.max_tokens, never_knew=reference)
    texts = read_text(states, encoded, max_bytes=settings.max_bytes) if encoded else {}
    measured = []
    with task("audit", total=len(states)) as line:
        for state in states:
            one = measure_model(state, questions, settings, texts.get(state.name), context)
            measured.append(with_suites(one, state, suites, context))
            line.advance(note=state.name)
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
    )


def _changes(base: Model, states: Sequence[State], masks: Mapping[str, WeightMask]) -> dict[str, Change]:
    """What each edit and control did to the weights."""
    compared = [state for state in states if state.role in ("edit", "control")]
    return {
        s.name: change_of(base, s.model if s.delta is None else s.delta, masks.get(s.name)) for s in compared
    }


def _pieces(base: Model, text: Sequence[str], settings: AuditSettings) -> list[Encoded]:
    """Neutral text as encoded pieces, up to the settings' number of tokens."""
    pieces = [piece for paragraph in text for piece in encode_text(base, paragraph, settings.text_block)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    kept, n = set(), 0
    for i in order:
        if n < settings.text_tokens:
            kept.add(i)
            n += pieces[i].n_target
    return [piece for i, piece in enumerate(pieces) if i in kept]


def with_suites(one: Measurement, state: State, suites: Sequence[Suite], context: Context) -> Measurement:
    """The measurement with the figures of every suite added."""
    start = time.perf_counter()
    items, scalars = dict(one.extra), dict(one.scalars)
    for suite in suites:
        found = suite.run(state, context)
        items |= found.items
        scalars |= found.scalars
    seconds = one.seconds + time.perf_counter() - start
    return replace(one, extra=items, scalars=scalars, seconds=seconds)


def _missing(
    questions: Mapping[str, Questions],
    text: bool,
    controls: bool,
    settings: AuditSettings,
    measured: Sequence[Measurement],
    suites: Sequence[Suite],
) -> list[dict[str, str]]:
    absent = {
        "paraphrases": ("paraphrase" in questions, "no forget fact has paraphrases"),
        "neighbours": ("neighbour" in questions, "no forget fact has neighbours"),
        "held-out facts": ("held_out" in questions, "no retain fact is marked held_out"),
        "near held-out facts": (
            "held_out_near" in questions,
            "no held-out fact shares a relation with a forget fact",
        ),
        "retained facts": ("retained" in questions, "no retain facts to train on were given"),
        "neutral text": (text, "no text was given"),
        "controls": (controls, "no control edits with random masks of equal size were given"),
        "inner layers": (settings.lens, "the logit lens was switched off"),
        "relearning": (
            settings.relearn is not None and len(questions["forget"]) > 1,
            "switched off, or fewer than two forget facts",
        ),
        "rounding": (bool(settings.rounding), "no weight formats were chosen"),
    }
    found = [{"what": what, "why": why} for what, (present, why) in absent.items() if not present]
    have = {key for m in measured for key in (*m.extra, *m.scalars)}
    wanted = [(f"attack {name}", "not asked for (settings.attacks)") for name in ATTACKS]
    asked = attacks_of(settings.attacks)
    found += [{"what": what, "why": why} for what, why in wanted if what.removeprefix("attack ") not in asked]
    expected = [key for name in asked for key in FIGURES_OF[name]] + [
        key for s in suites for key in s.figures
    ]
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
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("locus-unlearn", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
