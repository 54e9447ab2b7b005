"""Causal tracing (Meng et al. 2022, arXiv:2202.05262): which states carry the fact.

Three runs of a prompt: clean; corrupted, its subject's embeddings spoilt; and corrupted with one state put back.
A state that brings the answer back, alone, carried it. The grid of all (layer, position) is what `run` returns,
for block outputs, MLP and attention outputs over windows of layers, and the severed variants.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.artefact import lock
from locus.errors import InputError
from locus.fact import Fact
from locus.hooks import record
from locus.model import Model
from locus.progress import track
from locus.tokens import encode
from locus.trace import FactTrace, Trace, part_name
from tracing.corruption import Corrupter, Corruption, Prepared, prepare
from tracing.cost import Cost
from tracing.engine import Engine, EngineName
from tracing.plain import logits_of
from tracing.question import Answers, Inputs, Question, divergence
from tracing.readout import METRICS, Metric, Readout
from tracing.sites import Cell, Kind, cells_of


@dataclass(frozen=True)
class CausalTrace:
    """Restore one state at a time in a corrupted run, and measure what comes back."""

    kinds: tuple[Kind, ...] = ("block", "mlp", "attn")
    """What to restore: "block", "mlp", "attn", "block-no-mlp", "block-no-attn", "head:N"."""
    samples: int = 10
    """Draws of the corruption, the same in every cell of a fact."""
    corruption: Corruption = "gaussian"
    """"gaussian" or "uniform" noise on the subject's embeddings; "swap": another fact's subject; "mean": the
    mean subject embedding; "prompt": another fact's prompt of the same length."""
    noise_multiple: float = 3.0
    """Size of the noise in standard deviations of the facts' subject embeddings, pooled over all entries."""
    noise_sd: float | None = None
    """Size of the noise as a number, instead of the multiple."""
    window: int = 10
    """Layers restored together for "mlp" and "attn": [l - 5, l + 5) for 10, clipped."""
    metric: Metric = "prob"
    """"prob" of the whole target, teacher-forced; "first_prob", "logprob", "logit_diff", "kl", "rank"."""
    direction: Literal["denoise", "noise"] = "denoise"
    """"denoise": clean states into the corrupted run; "noise": corrupted states into the clean run."""
    tolerance: float | None = None
    """Keep drawing, up to `max_samples`, until no cell's standard error is above this; None: `samples` draws."""
    max_samples: int = 100
    """The most draws when a tolerance is given."""
    seed: int = 0
    engine: EngineName = "auto"
    """"auto", "replay" or "plain"; all give the same numbers."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise InputError("no kind to trace: give block, mlp or attn")
        if self.samples < 1 or self.window < 1:
            raise InputError(f"{self.samples} samples, window {self.window}: both must be at least 1")
        if self.metric not in METRICS:
            raise InputError(f"metric {self.metric!r}: not one of {', '.join(METRICS)}")
        if self.tolerance is not None and not (self.tolerance > 0 and self.max_samples >= self.samples):
            raise InputError("a tolerance must be above zero, and max_samples at least samples")

    def cost(self, model: Model, facts: Sequence[Fact], retain: Sequence[Fact] | None = None) -> Cost:
        """Whole forwards that the plain engine would take; replay computes a small part of them."""
        cells = model.atlas.n_layers * len(self.kinds) * sum(encode(model, f).target_start for f in facts)
        return Cost(float(cells * self.samples + len(facts) * (1 + self.samples)))

    def run(
        self,
        model: Model,
        facts: Sequence[Fact],
        *,
        folder: Path | None = None,
        resume: bool = False,
        batch_tokens: int | None = None,
    ) -> Trace:
        """Trace every fact.

        Args:
            model: Left as it is.
            facts: Their ids must differ. A fact without a subject has its whole prompt corrupted (but for BOS).
            folder: Where to write the trace; each finished fact is kept there at once.
            resume: Take up the facts that an interrupted run of the same settings finished there.
            batch_tokens: Tokens computed at once; None for the engine's own choice.

        Returns:
            The trace; the same whatever the order of the facts, the batch size or interruptions.

        Raises:
            InputError: no facts or equal ids; a fact that cannot be encoded; a run that gives NaN (names the
                layer and the fact); a corruption that finds no donor.
        """
        prepared = self._prepare(model, facts)
        corrupter = Corrupter.of(model, prepared, self.corruption, self.noise_multiple, self.noise_sd)
        settings = self._settings(corrupter)
        engine = Engine(model, self.engine, batch_tokens)
        parts = None if folder is None else Path(folder) / "parts"
        done = _finished(folder, settings, model) if folder is not None and resume else {}
        traces = []
        with lock(parts) if parts is not None else nullcontext():
            for one in track(prepared, "tracing facts"):
                trace = _same(done.get(one.fact.id), one) or self._resumed(
                    one, parts, settings, model, resume
                )
                if trace is None:
                    trace = self._trace(model, one, corrupter, engine)
                    if parts is not None:
                        trace.save(parts / _part(one, settings, model))
                traces.append(trace)
            result = Trace(tuple(traces), settings, model.fingerprint, model.atlas, model.name, _versions())
            if folder is not None and parts is not None:
                result.save(folder)
                for one in prepared:
                    (parts / _part(one, settings, model)).unlink(missing_ok=True)
        return result

    def _prepare(self, model: Model, facts: Sequence[Fact]) -> list[Prepared]:
        if not facts:
            raise InputError("no facts to trace")
        seen: dict[str, Fact] = {}
        for fact in facts:
            if fact.id in seen:
                raise InputError(f"two facts are called {fact.id!r}: ids name the results; make them differ")
            seen[fact.id] = fact
        prepared = [prepare(fact, encode(model, fact), model.bos, self.seed) for fact in facts]
        whole = [p.fact.id for p in prepared if p.encoded.subject is None]
        if whole:
            warnings.warn(
                f"{len(whole)} of {len(facts)} facts have no subject ({whole[0]!r}, …): "
                "their whole prompt is corrupted",
                stacklevel=3,
            )
        return prepared

    def _settings(self, corrupter: Corrupter) -> dict[str, Any]:
        """The hyperparameters, and what they came to on these facts; the engine gives the same numbers anyway."""
        fields = {name: value for name, value in asdict(self).items() if name != "engine"}
        fields["kinds"] = list(self.kinds)
        return {
            **fields,
            "pooled_subject_sd": corrupter.sd,
            "noise": corrupter.amplitude,
            **corrupter.provenance(),
        }

    def _resumed(
        self, one: Prepared, parts: Path | None, settings: Mapping[str, Any], model: Model, resume: bool
    ) -> FactTrace | None:
        if parts is None or not resume:
            return None
        part = parts / _part(one, settings, model)
        return FactTrace.load(part) if part.exists() else None

    def _trace(self, model: Model, one: Prepared, corrupter: Corrupter, engine: Engine) -> FactTrace:
        started = time.perf_counter()
        cap = self.samples if self.tolerance is None else self.max_samples
        corrupted = corrupter.inputs(model, one, cap)
        question = Question(base=corrupted, other=Inputs(one.ids), reads=one.reads)
        if self.direction == "noise":
            question = question.reversed()
        readout = self._readout(model, one, question)
        grids, asked = self._cells(model, one, divergence(question))
        answers = self._answer(engine, question, asked, readout)
        _refuse_nan(model, one, question, answers)
        return _assemble(self, one, corrupted, answers, grids, engine.used, time.perf_counter() - started)

    def _cells(
        self, model: Model, one: Prepared, diverges: int
    ) -> tuple[dict[Kind, list[list[int | None]]], list[Cell]]:
        """Per kind a grid of indices into the cells to ask; None where the runs do not differ yet."""
        n_pos = one.encoded.target_start
        index: dict[Cell, int] = {}
        grids = {}
        for kind in self.kinds:
            rows = cells_of(kind, model.atlas, range(n_pos), self.window)
            grids[kind] = [
                [
                    None if pos < diverges else index.setdefault(cell, len(index))
                    for pos, cell in enumerate(row)
                ]
                for row in rows
            ]
        return grids, list(index)

    def _answer(self, engine: Engine, question: Question, cells: Sequence[Cell], readout: Readout) -> Answers:
        """All draws, or as many as the tolerance asks for."""
        total = question.samples
        answers = engine.answer(question.draws(slice(0, min(self.samples, total))), cells, readout)
        while self.tolerance is not None and (n := _drawn(answers)) < total:
            if float(_standard_error(answers.cells[..., 0]).max()) <= self.tolerance:
                break
            more = engine.answer(question.draws(slice(n, min(2 * n, total))), cells, readout)
            answers = _joined(answers, more)
        return answers

    def _readout(self, model: Model, one: Prepared, question: Question) -> Readout:
        labels = torch.tensor(one.encoded.target_ids)
        clean, foil = None, None
        if self.metric in ("kl", "logit_diff"):
            with torch.no_grad():
                clean = logits_of(model, Inputs(one.ids), question.reads[:1], 1)[0, 0].float().cpu()
            foil = _foil(model, one, clean)
        return Readout(self.metric, labels, foil, clean)


def _assemble(
    settings: CausalTrace,
    one: Prepared,
    corrupted: Inputs,
    answers: Answers,
    grids: Mapping[Kind, list[list[int | None]]],
    engine: str,
    seconds: float,
) -> FactTrace:
    samples = _drawn(answers)
    cells = answers.cells.double()[..., 0]
    base = answers.base.double().expand(samples, -1)
    mean, error = cells.mean(dim=1), _standard_error(cells)
    base_mean, base_error = base[:, 0].mean(), _standard_error(base[None, :, 0])[0]

    def grid(values: Tensor, untouched: Tensor, kind: Kind) -> Float[Tensor, "layer pos"]:
        rows = [[untouched if i is None else values[i] for i in row] for row in grids[kind]]
        return torch.stack([torch.stack(row) for row in rows]).float()

    denoising = settings.direction == "denoise"
    clean, spoilt = (answers.other, answers.base) if denoising else (answers.base, answers.other)
    clean_score, clean_prob = clean.double().mean(dim=0).tolist()
    corrupted_score, corrupted_prob = spoilt.double().mean(dim=0).tolist()
    return FactTrace(
        fact_id=one.fact.id,
        prompt=one.fact.prompt,
        target=one.fact.target,
        tokens=one.encoded.tokens[: one.encoded.target_start],
        subject=one.encoded.subject,
        corrupted=corrupted.positions,
        scores={kind: grid(mean, base_mean, kind) for kind in grids},
        standard_error={kind: grid(error, base_error, kind) for kind in grids},
        clean_prob=clean_prob,
        corrupted_prob=corrupted_prob,
        clean_score=clean_score,
        corrupted_score=corrupted_score,
        seed=one.seed,
        samples=samples,
        patched_forwards=sum(len(rows) * len(rows[0]) for rows in grids.values()) * samples,
        engine=engine,
        work={"seconds": seconds, "tokens": answers.tokens, "peak_bytes": answers.peak_bytes},
    )


def _foil(model: Model, one: Prepared, clean: Tensor) -> int:
    """First token of the first alternative that begins otherwise than the target; else the runner-up."""
    own = one.encoded.target_ids[0]
    for alternative in one.fact.alternatives:
        ids = encode(model, type(one.fact.example)(one.fact.prompt, alternative)).target_ids
        if ids[0] != own:
            return int(ids[0])
    first, second = clean.topk(2).indices.tolist()
    return int(second if first == own else first)


def _drawn(answers: Answers) -> int:
    return max(answers.base.shape[0], answers.other.shape[0])


def _joined(a: Answers, b: Answers) -> Answers:
    """Two sets of draws as one; a run that has a single draw keeps it."""

    def runs(x: Tensor, y: Tensor, vary: bool) -> Tensor:
        return torch.cat([x, y]) if vary else x

    base_varies = a.base.shape[0] == a.cells.shape[1]
    other_varies = a.other.shape[0] == a.cells.shape[1]
    return Answers(
        runs(a.base, b.base, base_varies),
        runs(a.other, b.other, other_varies),
        torch.cat([a.cells, b.cells], dim=1),
        a.tokens + b.tokens,
        max(a.peak_bytes, b.peak_bytes),
    )


def _standard_error(draws: Float[Tensor, "cell sample"]) -> Float[Tensor, " cell"]:
    n = draws.shape[1]
    return draws.std(dim=1) / n**0.5 if n > 1 else torch.zeros_like(draws[:, 0])


def _part(one: Prepared, settings: Mapping[str, Any], model: Model) -> str:
    about = {
        **settings,
        "prompt": one.fact.prompt,
        "target": one.fact.target,
        "corrupted": list(one.positions),
    }
    return part_name(one.fact.id, about, model.fingerprint)


def _finished(folder: Path, settings: Mapping[str, Any], model: Model) -> dict[str, FactTrace]:
    """The facts of a trace that is complete in `folder`, if it was made the same way."""
    if not (Path(folder) / "trace.safetensors").exists():
        return {}
    old = Trace.load(folder)
    same = old.fingerprint == model.fingerprint and dict(old.settings) == dict(settings)
    return {fact.fact_id: fact for fact in old} if same else {}


def _same(trace: FactTrace | None, one: Prepared) -> FactTrace | None:
    """The finished trace, unless the fact has changed since."""
    if trace is None:
        return None
    now = (one.fact.prompt, one.fact.target, one.encoded.subject)
    return trace if now == (trace.prompt, trace.target, trace.subject) else None


def _refuse_nan(model: Model, one: Prepared, question: Question, answers: Answers) -> None:
    """An InputError that names the first layer whose output is not finite."""
    if all(torch.isfinite(scores).all() for scores in (answers.base, answers.other, answers.cells)):
        return
    for run in (question.other, question.base):
        with torch.no_grad(), record(model.module, outputs=model.atlas.blocks) as seen:
            logits_of(model, run, question.reads, run.samples)
        for layer, block in enumerate(model.atlas.blocks):
            if not torch.isfinite(seen.outputs[block]).all():
                raise InputError(
                    f"fact {one.fact.id!r}: layer {layer} of {model.name} gives NaN or infinity: damaged weights, or a "
                    "dtype too small (try --dtype float32)"
                )
    raise InputError(
        f"fact {one.fact.id!r}: the unembedding of {model.name} gives NaN or infinity; try --dtype float32"
    )


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}
