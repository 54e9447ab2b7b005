"""Causal tracing (Meng et al. 2022, arXiv:2202.05262): which states carry the fact.

Three runs of a prompt: clean; corrupted, with noise on its subject's embeddings; and corrupted with one state restored.
A state that brings the answer back, alone, carried it. The grid of all (layer, position) is what `run` returns,
for block outputs, MLP and attention outputs over windows of layers, the severed variants and single heads.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.hooks import record
from locus.model import Model
from locus.parallel.ranks import ALONE, Ranks
from locus.throughput import flops_of, forget_peak, peak_bytes
from locus.tokens import encode
from locus.trace import FactTrace, Trace
from tracing.checked_settings import checked_choices
from tracing.engine import Engine, EngineName
from tracing.localizer import Cost
from tracing.patching.attribution import can_estimate, estimate
from tracing.patching.corruption import Corrupter, Corruption, Prepared, prepare
from tracing.patching.grids import (
    Estimates,
    Grids,
    Plan,
    assemble,
    drawn,
    join_draws,
    most_promising,
    standard_error,
)
from tracing.patching.plain_engine import logits_of
from tracing.patching.readout import METRICS, Metric, Readout
from tracing.patching.resume import FinishedFacts
from tracing.patching.runs import Asked, Inputs, PatchingQuestion, RunScores, divergence
from tracing.patching.sites import Kind, cells_of

_UNSETTLING = ("engine", "batch_tokens")
"""Settings that do not change the numbers."""


@dataclass(frozen=True)
@checked_choices
class CausalTrace:
    """Restore one state at a time in a corrupted run, and measure what comes back."""

    kinds: tuple[Kind, ...] = ("block", "mlp", "attn")
    """What to restore: "block", "mlp", "attn", "block-no-mlp", "block-no-attn", and of single heads "head:N" (their
    output), "query:N", "key:N", "value:N"."""
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
    together: bool = False
    """Restore all tokens of the subject at once (and all before it, and all between it and the last token)."""
    metric: Metric = "prob"
    """"prob" of the whole target, teacher-forced; "first_prob", "logprob", "logit_diff", "kl", "rank"."""
    direction: Literal["denoise", "noise"] = "denoise"
    """"denoise": clean states into the corrupted run; "noise": corrupted states into the clean run."""
    method: Literal["exact", "attribution", "hybrid"] = "exact"
    """"exact": every cell; "attribution": first-order estimates from two forwards and a backward; "hybrid": estimates,
    and the most promising cells exactly. Severed variants are always exact."""
    verify: float = 0.1
    """Fraction of each kind's cells that "hybrid" answers exactly."""
    points: int = 1
    """Points between the two runs at which attribution takes the gradient (integrated gradients above 1)."""
    attention_fix: bool = True
    """Whether estimates for queries and keys recompute the softmax (AtP*) instead of following its gradient."""
    tolerance: float | None = None
    """Keep drawing, up to `max_samples`, until no cell's standard error is above this; None: `samples` draws."""
    max_samples: int = 100
    """The most draws when a tolerance is given."""
    seed: int = 0
    engine: EngineName = "auto"
    """"auto", "replay" or "plain"; all give the same numbers."""
    batch_tokens: int | None = None
    """Tokens computed at once; None for a size that suits the device and its free memory."""

    def __post_init__(self) -> None:
        if not self.kinds:
            raise InputError("no kind to trace: give block, mlp or attn")
        if self.samples < 1 or self.window < 1 or self.points < 1:
            raise InputError("samples, window and points: all must be at least 1")
        if self.metric not in METRICS:
            raise InputError(f"metric {self.metric!r}: not one of {', '.join(METRICS)}")
        if self.tolerance is not None and not (self.tolerance > 0 and self.max_samples >= self.samples):
            raise InputError("a tolerance must be above zero, and max_samples at least samples")
        if not 0 < self.verify <= 1:
            raise InputError(f"verify {self.verify}: a fraction above 0, at most 1")
        if self.batch_tokens is not None and self.batch_tokens < 1:
            raise InputError(f"batch tokens {self.batch_tokens}: at least 1")

    def cost(self, model: Model, facts: Sequence[Fact], retain: Sequence[Fact] | None = None) -> Cost:
        """Whole forwards that the plain engine would take; replay computes a small part of them."""
        runs = float(len(facts) * (1 + self.samples))
        if self.method == "attribution":
            return Cost(runs, float(len(facts) * self.samples * self.points))
        cells = model.atlas.n_layers * len(self.kinds) * sum(encode(model, f).target_start for f in facts)
        share = self.verify if self.method == "hybrid" else 1.0
        return Cost(cells * self.samples * share + runs)

    def run(
        self,
        model: Model,
        facts: Sequence[Fact],
        *,
        folder: Path | None = None,
        resume: bool = False,
        ranks: Ranks = ALONE,
    ) -> Trace:
        """Trace every fact.

        Args:
            model: Left as it is.
            facts: Their ids must differ. A fact without a subject has its whole prompt corrupted (but for BOS).
            folder: Where to write the trace; each finished fact is kept there at once.
            resume: Take up the facts that an interrupted run of the same settings finished there.
            ranks: The processes to share the facts among, all of which call this with the same arguments;
                the folder is where they exchange what they found.

        Returns:
            The trace; the same whatever the order of the facts, the batch size, interruptions or the number
            of processes.

        Raises:
            InputError: no facts or equal ids; a fact that cannot be encoded; a run that gives NaN (names the
                layer and the fact); a corruption that finds no donor.
        """
        prepared = self._prepare(model, facts)
        corrupter = Corrupter.of(model, prepared, self.corruption, self.noise_multiple, self.noise_sd)
        settings = self._settings(corrupter)
        engine = Engine(model, self.engine, self.batch_tokens)
        with FinishedFacts.open(folder, settings, model, resume, ranks) as finished:
            for pack in finished.share(self._packs(model, prepared, engine)):
                if any(finished.get(one) is None for one in pack):
                    for one, trace in zip(pack, self._trace(model, pack, corrupter, engine), strict=True):
                        finished.keep(one, trace)
            traces = tuple(finished.collect(one) for one in prepared)
            about = (model.fingerprint, model.atlas, model.name, _versions(model), finished.inputs(prepared))
            result = Trace(traces, settings, *about)
            finished.finish(result, prepared)
        return result

    def _packs(self, model: Model, prepared: Sequence[Prepared], engine: Engine) -> list[list[Prepared]]:
        """Facts that are traced together: several where one alone does not fill two calls.

        The same packs whatever the order of the facts, and of a run that is resumed: to the bit, a number depends on
        what it is computed beside.
        """
        enough = 2 * engine.rows_at_once()
        packs: list[list[Prepared]] = []
        rows = enough
        for one in sorted(prepared, key=lambda p: (p.encoded.target_start, p.fact.id)):
            if rows >= enough or self.tolerance is not None:
                packs.append([])
                rows = 0
            packs[-1].append(one)
            n = one.encoded.target_start - one.positions[0]
            rows += n * (n + 1) // 2 * model.atlas.n_layers * len(self.kinds) * self.samples
        return packs

    def _prepare(self, model: Model, facts: Sequence[Fact]) -> list[Prepared]:
        if not facts:
            raise InputError("no facts to trace")
        seen: set[str] = set()
        for fact in facts:
            if fact.id in seen:
                raise InputError(f"two facts are called {fact.id!r}: ids name the results; make them differ")
            seen.add(fact.id)
        prepared = [prepare(fact, encode(model, fact).without_end, model.bos, self.seed) for fact in facts]
        twice = [p.fact.id for p in prepared if model.chat and p.encoded.subject and _stands_twice(p)]
        if twice:
            warnings.warn(
                f"{len(twice)} of {len(facts)} facts ({twice[0]!r}, …) stand twice in their conversation, in the "
                "question and in the answer: only the answer's subject is corrupted; ask them as questions to have one",
                stacklevel=3,
            )
        whole = [p.fact.id for p in prepared if p.encoded.subject is None]
        if whole:
            warnings.warn(
                f"{len(whole)} of {len(facts)} facts have no subject ({whole[0]!r}, …): "
                "their whole prompt is corrupted",
                stacklevel=3,
            )
        return prepared

    def _settings(self, corrupter: Corrupter) -> dict[str, Any]:
        """The hyperparameters, and what they came to on these facts."""
        fields = {name: value for name, value in asdict(self).items() if name not in _UNSETTLING}
        noise = {"pooled_subject_sd": corrupter.sd, "noise": corrupter.amplitude}
        return {**fields, "kinds": list(self.kinds), **noise, **corrupter.provenance()}

    def _trace(
        self, model: Model, pack: Sequence[Prepared], corrupter: Corrupter, engine: Engine
    ) -> list[FactTrace]:
        started = time.perf_counter()
        forget_peak(model)
        plans = [self._plan(model, one, corrupter) for one in pack]
        if self.tolerance is not None:
            answers = [self._draw_enough(engine, plan.asked) for plan in plans]
        else:
            answers = engine.answer_all([plan.asked for plan in plans])
        for plan, answer in zip(plans, answers, strict=True):
            _refuse_nan(model, plan.one, plan.asked.question, answer)
        seconds = time.perf_counter() - started
        total = sum(answer.tokens for answer in answers)
        return [
            assemble(
                plan,
                answer,
                denoising=self.direction == "denoise",
                engine=engine.used,
                work={
                    "seconds": seconds * answer.tokens / total,
                    "tokens": answer.tokens,
                    "flops": flops_of(model, answer.tokens),
                    "peak_bytes": peak_bytes(model),
                    "matrix_peak_flops_per_second": engine.matrix_peak,
                },
            )
            for plan, answer in zip(plans, answers, strict=True)
        ]

    def _plan(self, model: Model, one: Prepared, corrupter: Corrupter) -> Plan:
        """The question of a fact, its cells, and the estimates that stand for some of them."""
        cap = self.samples if self.tolerance is None else self.max_samples
        corrupted = corrupter.inputs(model, one, cap)
        question = PatchingQuestion(base=corrupted, other=Inputs(one.ids), reads=one.reads)
        if self.direction == "noise":
            question = question.reversed()
        readout = self._readout(model, one, question)
        columns = _columns(one, self.together)
        rows = {kind: cells_of(kind, model.atlas, columns, self.window) for kind in self.kinds}
        grids = Grids.of(rows, divergence(question))
        estimates = None if self.method == "exact" else self._estimate(model, question, readout, grids)
        cells = grids.cells if estimates is None else [grids.cells[i] for i in estimates.exact]
        return Plan(one, corrupted, Asked(question, cells, readout), grids, estimates)

    def _estimate(
        self, model: Model, question: PatchingQuestion, readout: Readout, grids: Grids
    ) -> Estimates:
        """Estimates of all cells that have one, and the cells to answer exactly."""
        question = question.draws(slice(0, self.samples)) if self.tolerance is None else question
        guessed = [kind for kind in self.kinds if can_estimate(kind)]
        numbers = grids.numbers(guessed)
        found, base = estimate(
            model,
            question,
            readout,
            [grids.cells[i] for i in numbers],
            points=self.points,
            noising=self.direction == "noise",
            fix_attention=self.attention_fix,
            batch_tokens=self.batch_tokens or 4096,
        )
        values = torch.full((len(grids.cells), question.samples), float("nan"), dtype=found.dtype)
        values[numbers] = found
        exact = set(grids.numbers([kind for kind in self.kinds if kind not in guessed]))
        if self.method == "hybrid":
            exact |= set(most_promising(grids, guessed, values, float(base.mean()), self.verify))
        return Estimates(values, tuple(sorted(exact)))

    def _draw_enough(self, engine: Engine, asked: Asked) -> RunScores:
        """As many draws as the tolerance asks for."""
        question, cells, readout = asked.question, asked.cells, asked.readout
        total = question.samples
        answers = engine.answer(question.draws(slice(0, min(self.samples, total))), cells, readout)
        while self.tolerance is not None and cells and (n := drawn(answers)) < total:
            if n > 1 and float(standard_error(answers.cells[..., 0]).max()) <= self.tolerance:
                break
            more = engine.answer(question.draws(slice(n, min(2 * n, total))), cells, readout)
            answers = join_draws(answers, more)
        return answers

    def _readout(self, model: Model, one: Prepared, question: PatchingQuestion) -> Readout:
        labels = torch.tensor(one.encoded.target_ids)
        clean, foil = None, None
        if self.metric in ("kl", "logit_diff"):
            with torch.no_grad():
                clean = logits_of(model, Inputs(one.ids), question.reads[:1], 1)[0, 0].float().cpu()
            foil = _foil(model, one, clean)
        return Readout(self.metric, labels, foil, clean)


def _stands_twice(one: Prepared) -> bool:
    """Whether the prompt is said by the user too, before the subject that is corrupted."""
    assert one.encoded.subject is not None
    said = "".join(one.encoded.tokens[: one.encoded.subject[0]])
    return one.fact.subject is not None and one.fact.subject in said


def _columns(one: Prepared, together: bool) -> list[tuple[int, ...]]:
    """What each column of a grid restores: its position, or the whole stretch that it belongs to."""
    n_pos = one.encoded.target_start
    if not together:
        return [(q,) for q in range(n_pos)]
    start, stop = one.positions[0], one.positions[-1] + 1
    edges = sorted({0, start, stop, max(stop, n_pos - 1), n_pos})
    stretches = [tuple(range(a, b)) for a, b in pairwise(edges)]
    return [stretch for stretch in stretches for _ in stretch]


def _foil(model: Model, one: Prepared, clean: Tensor) -> int:
    """First token of the first alternative that begins otherwise than the target; else the runner-up."""
    own = one.encoded.target_ids[0]
    for alternative in one.fact.alternatives:
        ids = encode(model, Example(one.fact.prompt, alternative)).target_ids
        if ids[0] != own:
            return int(ids[0])
    first, second = clean.topk(2).indices.tolist()
    return int(second if first == own else first)


def _refuse_nan(model: Model, one: Prepared, question: PatchingQuestion, answers: RunScores) -> None:
    """An InputError that names the first layer whose output is not finite."""
    if all(bool(torch.isfinite(scores).all()) for scores in (answers.base, answers.other, answers.cells)):
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


def _versions(model: Model) -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": model.device.type}
