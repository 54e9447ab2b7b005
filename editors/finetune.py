"""The one masked training loop: every objective, every kind of mask, every optimizer.

Only the deltas of the mask's entries are trained; the base is frozen, and is the reference model whenever the
deltas are silenced. What a step sees depends on the seed and the step's number alone, so a run that was killed
goes on to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from editors.data import Asked, Data
from editors.guard import unmoved
from editors.lora import LoraDeltas
from editors.parametrize import Deltas, Trained
from editors.prediction import Kept, Prediction
from editors.recompute import recomputed
from editors.reference import FACT_TOKENS, References
from editors.result import settings_of, weight_delta
from editors.retain import Retain, mean_kl
from editors.rounding import saved_dtypes
from editors.sophia import SophiaG
from editors.state import RunState, identity, load_state, save_state
from editors.stopping import RISE, look, verdict
from editors.training import Training, generator, lr_at, make_optimizer
from locus import progress
from locus.delta import WeightDelta
from locus.embedded import cache_folder
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import Batch, collate, measure
from locus.mask import WeightMask
from locus.model import Model
from locus.tokens import Encoded, encode

Log = Callable[[Mapping[str, Any]], None]
"""Called with one record a step: see `Run.take_step`."""

HESSIAN_EVERY = 10
"""Steps between two estimates of Sophia's Hessian (Jia et al. 2024)."""


@runtime_checkable
class Objective(Protocol):
    """What the loop needs of an editor: its loss on forget examples and its settings."""

    @property
    def retain(self) -> Retain:
        """The retain term."""

    @property
    def training(self) -> Training:
        """The training settings."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """The loss to lower on a batch of forget examples: a mean over its examples."""


@runtime_checkable
class Answering(Protocol):
    """An objective that also looks at another answer to each prompt."""

    def answer(self, fact: Fact, pool: Sequence[Fact], step: int) -> Example:
        """The fact's prompt with that answer; `pool` are all facts that may be looked at."""


@runtime_checkable
class Finishing(Protocol):
    """An objective with a stopping rule of its own, asked at looks once `min_steps` are done."""

    def done(self, model: Model, forget: Sequence[Encoded]) -> bool:
        """Whether the forget examples are forgotten by its own measure."""


def finetune(
    objective: Objective,
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    mask: WeightMask,
    *,
    text: Sequence[str] = (),
    folder: Path | None = None,
    resume: bool = False,
    log: Log | None = None,
) -> WeightDelta:
    """Train the located weights; the model in memory ends bit for bit as it was.

    Args:
        objective: The editor: what is lowered on the forget facts, the retain term, the training settings.
        model: The model to edit.
        forget: What must go. Their paraphrases and neighbours are never trained on.
        retain: What must stay. Facts marked `held_out` are left for the audit and never trained on.
        mask: The weights that may move.
        text: Neutral paragraphs for the retain term.
        folder: Where resumable states are kept; None keeps none.
        resume: Go on from the state in `folder`, if there is one.
        log: Called after every step with its record (JSON values); on resuming, first with those of earlier steps.

    Returns:
        The delta; its provenance says how the run ended and what rounding to the model's dtype lost.

    Raises:
        InputError: nothing to forget, a mask of another model, a retain term without retain data, a state of
            another run, or a loss that is not a finite number.
        MaskLeak: a weight that must not move did.
    """
    mask.check(model)
    training = objective.training
    deltas = _deltas(model, mask, training)
    with unmoved(model.module):
        data = Data.read(model, forget, retain, text, objective.retain, training)
        run = Run(
            objective,
            model,
            deltas,
            data,
            make_optimizer(training, deltas.parameters),
            _references(objective.retain, model, deltas),
        )
        state = run.start(folder if resume else None)
        with (
            deltas.attached(),
            recomputed(model, training.checkpointing),
            progress.task("edit", total=training.steps) as line,
        ):
            for record in state.history:
                line.advance()
                if log is not None:
                    log(record)
            while not state.stopped:
                record = run.take_step(state)
                line.advance(note=f"forget p {record['forget_prob']:.3f}")
                if log is not None:
                    log(record)
                if folder is not None and (state.stopped or state.step % training.save_every == 0):
                    save_state(folder, run.identity, state, deltas.values, run.optimizer)
        if state.stopped == "utility floor":
            deltas.load(state.good)
        return weight_delta(model, mask, deltas, training, run.provenance(state))


def _deltas(model: Model, mask: WeightMask, training: Training) -> Trained:
    """The trainable form of the mask that the settings ask for."""
    if training.lora_rank:
        return LoraDeltas(model.module, mask, training.lora_rank, training.seed)
    saved = saved_dtypes(model, mask) if training.rounding == "compensated" else None
    return Deltas(model.module, mask, saved)


def _references(term: Retain, model: Model, deltas: Trained) -> References | None:
    """Where the base's logits are kept, if they are to be kept."""
    if term.reference == "live":
        return None
    folder = cache_folder() / "references" if term.reference == "disk" else None
    return References(model, deltas, folder, FACT_TOKENS if term.reference == "facts" else None)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the loop."""

    objective: Objective
    model: Model
    deltas: Trained
    data: Data
    optimizer: torch.optim.Optimizer
    references: References | None = None
    """The base's logits, where they are kept."""

    @property
    def identity(self) -> str:
        """Of the run: settings, mask, data, model and dtype."""
        return identity(
            settings_of(self.objective),
            self.data.fingerprint(),
            WeightMask(self.deltas.selections).digest,
            [self.model.fingerprint, str(self.model.dtype)],
        )

    def start(self, folder: Path | None) -> RunState:
        """The state to go on from: the one in `folder`, or a fresh one."""
        if folder is not None:
            state = load_state(folder, self.identity, self.deltas.values, self.optimizer)
            if state is not None:
                return state
        return RunState.fresh(len(self.data.forget), self.deltas.values)

    def take_step(self, state: RunState) -> dict[str, Any]:
        """One optimizer step and, when one is due, a look at utility; sets `state.stopped` when the run is over.

        Returns:
            The step's record: `step`, `lr`, `forget_loss`, `forget_prob` (mean probability of the forget targets
            before the step), `forget_correct` (share top-1 then), `active` (share still pushed), `retain_loss`
            (unweighted), `kl` (nats a token on this step's retain data), `grad_norm` (before clipping), `utility`
            (share of the probe facts still right after the step, at looks). None stands for "not computed".
        """
        training, step = self.objective.training, state.step
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(training, step)
        if isinstance(self.optimizer, SophiaG) and step % HESSIAN_EVERY == 0:
            self._estimate_hessian(self.optimizer, step)
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, Any] = {"step": step + 1, "lr": lr_at(training, step), "utility": None}
        record |= self._push(state, step)
        record |= self._hold(step)
        record["grad_norm"] = self._clip(step)
        self.optimizer.step()
        state.step += 1
        record = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in record.items()}
        state.history.append(record)
        state.stopped = verdict(training, self.data, state)
        looking = state.step % training.check_every == 0
        if looking and state.step >= training.min_steps and isinstance(self.objective, Finishing):
            state.stopped = state.stopped or (
                "goal" if self.objective.done(self.model, self.data.forget) else ""
            )
        if state.stopped or looking:
            look(self.model, training, self.data, state, self.deltas)
        return record

    def provenance(self, state: RunState) -> dict[str, Any]:
        """How the run went, as JSON values."""
        prob = (-state.nll).exp()
        return {
            "editor": settings_of(self.objective),
            "stopped": state.stopped,
            "steps": state.good_step if state.stopped == "utility floor" else state.step,
            "n_weights": self.deltas.n_weights,
            "forget_prob_before": float(self.data.reference.prob.mean()),
            "forget_prob_after": float(prob.nanmean()),
            "over_forgotten": self._over_forgotten(state),
            "unreached": [n for n, v in self.deltas.values.items() if not v.detach().any()],
            "last": state.history[-1],
        }

    def _kept(self, encoded: Sequence[Encoded]) -> Kept | None:
        """How the base's logits on batches of these examples are had, where they are kept."""
        references = self.references
        return None if references is None else lambda batch: references.logits(encoded, batch)

    def _push(self, state: RunState, step: int) -> dict[str, Any]:
        """Backward of the forget loss, batch by batch, and what is now known of the forget examples."""
        data, training = self.data, self.objective.training
        plain = list(data.forget_batches(training, step))
        other = list(data.reworded_batches(training, step))
        chosen = [number for batch in plain for number in batch.examples]
        n_examples = len(chosen) + sum(len(batch.examples) for batch in other)
        loss_sum, n_active = 0.0, 0
        for batch in plain:
            forget = self._forget(data.plain, batch, step)
            loss, active = self._lower(data.plain, forget, n_examples, step)
            loss_sum, n_active = loss_sum + loss, n_active + active
            if forget.has_run:
                state.nll[list(batch.examples)] = forget.nll.detach().float().cpu()
                state.correct[list(batch.examples)] = forget.correct.float().cpu()
            elif step % training.check_every == 0:
                scores = measure(self.model, [data.forget[i] for i in batch.examples], training.batch_tokens)
                state.nll[list(batch.examples)] = scores.nll
                state.correct[list(batch.examples)] = scores.correct.float()
        for batch in other:
            forget = self._forget(data.reworded, batch, step)
            loss_sum += self._lower(data.reworded, forget, n_examples, step)[0]
        return {
            "forget_loss": loss_sum,
            "forget_prob": float((-state.nll[chosen]).exp().nanmean()),
            "forget_correct": float(state.correct[chosen].mean()),
            "active": n_active / len(chosen),
        }

    def _lower(self, asked: Asked, forget: Prediction, n_examples: int, step: int) -> tuple[float, int]:
        """Backward of the loss of one of a step's batches; its share of the step's loss, and how many were pushed.

        Examples that are gone already get no push.
        """
        training = self.objective.training
        active = self._active(forget)
        if not active.any():
            return 0.0, 0
        pushed = forget if active.all() else forget.only(active)
        if training.attack.steps:
            pushed = pushed.under(training.attack.found(self.model, pushed.batch))
        loss = self.objective.forget_loss(pushed) * (pushed.n_examples / n_examples)
        loss.backward()
        return self._finite("forget loss", step, loss), int(active.sum())

    def _forget(self, asked: Asked, batch: Batch, step: int) -> Prediction:
        """A batch of forget examples, with another answer to the same prompts where the objective has one."""
        objective, pool = self.objective, [*self.data.facts, *self.data.kept_facts]

        def answer(numbers: Sequence[int]) -> Prediction:
            assert isinstance(objective, Answering)
            others = [objective.answer(asked.facts[i], pool, step) for i in numbers]
            encoded = [encode(self.model, other) for other in others]
            batch = collate(encoded, range(len(encoded)))
            return Prediction(self.model, self.deltas, batch, kept=self._kept(encoded))

        other = answer if isinstance(objective, Answering) else None
        kept = self._kept(asked.encoded)
        return Prediction(self.model, self.deltas, batch, asked.reference.nll, other, kept)

    def _active(self, forget: Prediction) -> Bool[Tensor, " example"]:
        """Which examples are still pushed: those not improbable yet, or not improbable through this edit."""
        floor = self.objective.training.floor
        if not floor:
            return torch.ones(forget.n_examples, dtype=torch.bool)
        nll = forget.nll.detach()
        risen = nll - forget.ref_nll.to(nll.device) >= RISE * forget.n_tokens
        return ~((nll > -math.log(floor)) & risen)

    def _hold(self, step: int) -> dict[str, Any]:
        """Backward of the retain term on this step's facts and texts, each a mean over its tokens."""
        term, training = self.objective.retain, self.objective.training
        if not term.active:
            return {"retain_loss": None, "kl": None}
        loss_sum, kl_sum, n_labels = 0.0, 0.0, 0
        data = self.data
        for encoded, source in ((data.retain, data.retain_batches), (data.texts, data.text_batches)):
            batches = list(source(term, training, step))
            n = sum(len(batch.labels) for batch in batches)
            for batch in batches:
                kept = Prediction(self.model, self.deltas, batch, kept=self._kept(encoded))
                loss = term.loss(kept) * (len(batch.labels) / n)
                loss_sum += self._finite("retain loss", step, loss)
                (term.weight * loss).backward()
                kl_sum += mean_kl(kept) * len(batch.labels)
            n_labels += n
        return {"retain_loss": loss_sum, "kl": kl_sum / n_labels}

    def _clip(self, step: int) -> float:
        """Clip the gradient of all deltas together; its norm before that."""
        most = self.objective.training.clip or math.inf
        with_gradient = [p for p in self.deltas.parameters if p.grad is not None]
        if step == 0 and not with_gradient:
            raise InputError(
                "no located weight influences the loss: the mask lies above the layers this objective runs, or in "
                "parameters the model does not use"
            )
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, most)
        return self._finite("gradient norm", step, norm)

    def _finite(self, what: str, step: int, value: Tensor) -> float:
        """The value as a number, if it is one."""
        number = float(value.detach())
        if not math.isfinite(number):
            raise InputError(
                f"step {step + 1}: the {what} is {number}; lower the learning rate (now "
                f"{lr_at(self.objective.training, step):g}) or load the model in float32"
            )
        return number

    def _over_forgotten(self, state: RunState) -> list[str]:
        """Facts whose target is now less probable than a random token string of its length."""
        chance = math.log(self.model.atlas.d_vocab) * self.data.reference.n_tokens
        flags = (state.nll > chance).tolist()
        return [fact.id for fact, flag in zip(self.data.facts, flags, strict=True) if flag]

    def _estimate_hessian(self, optimizer: SophiaG, step: int) -> None:
        """Gauss-Newton-Bartlett: squared gradients of the NLL of labels drawn from the model itself."""
        term, training = self.objective.retain, self.objective.training
        batches: list[Batch] = [*self.data.forget_batches(training, step)]
        if term.active:
            batches += self.data.retain_batches(term, training, step)
        n = sum(len(batch.labels) for batch in batches)
        optimizer.zero_grad(set_to_none=True)
        source = generator(training.seed, "hessian", step)
        for batch in batches:
            logits = Prediction(self.model, self.deltas, batch).logits
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=source).flatten()
            (F.cross_entropy(logits, drawn.to(logits.device), reduction="sum") / n).backward()
        optimizer.update_hessian(n)
