"""The one masked training loop: every objective, every kind of mask, every optimizer.

Only the deltas of the mask's entries are trained. The base is frozen; with the deltas silenced it is the reference
model. The examples of a step depend on the seed and the step's number alone, so a resumed run gives the same bits as
one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import EditData, EditRun, Log
from editors.training.activation_checkpointing import activation_checkpointing
from editors.training.data import Data, ForgetExamples
from editors.training.hessian import EVERY as HESSIAN_EVERY
from editors.training.hessian import estimate_hessian
from editors.training.lora import LoraDeltas
from editors.training.objective import Answering, Finishing, Objective, retain_loss
from editors.training.parametrize import Deltas, Trained
from editors.training.prediction import Prediction, StoredLogits
from editors.training.processes import ONE_PROCESS, Processes, WorkSplit
from editors.training.reference import References, known_states
from editors.training.retain import Retain, mean_kl
from editors.training.rounding import saved_dtypes
from editors.training.run_state import RunState, identity, load_state, save_state
from editors.training.settings import Training, lr_at, make_optimizer
from editors.training.sophia import SophiaG
from editors.training.stopping_rules import RISE, check_utility, stop_reason
from editors.training.trained_delta import weight_delta
from editors.training.unchanged import weights_unchanged
from locus import progress
from locus.delta import WeightDelta
from locus.embedded import cache_folder
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import Batch, collate, measure
from locus.input_digest import model_digests
from locus.mask import WeightMask
from locus.model import Model
from locus.nonfinite import first_at_fault
from locus.parallel.ranks import ALONE, Ranks
from locus.parallel.sharding import full_tensor
from locus.tokens import Encoded, encode


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
    ranks: Ranks = ALONE,
) -> WeightDelta:
    """Train the located weights; the model in memory ends bit for bit as it was.

    Args:
        objective: The editor: what is lowered on the forget facts, the retain term, the training settings.
        model: The model to edit.
        forget: Facts to forget. Their paraphrases and neighbours are never trained on.
        retain: Facts to keep. Those marked `held_out` are left for the audit and never trained on.
        mask: The weights that may move.
        text: Neutral paragraphs for the retain term.
        folder: Folder for resumable states; None saves none.
        resume: Go on from the state in `folder`, if there is one.
        log: Called after every step with its record (JSON values); on resuming, first with those of earlier steps.
        ranks: The processes that share every optimizer step. All of them call this with the same arguments and see
            the same `folder`. Each holds the whole model, or a shard of it (FSDP2).

    Returns:
        The delta, the same on every process and equal to a single process's within rounding. Its provenance says how
        the run ended, its `rounding` what the cast to the checkpoint's dtype cost.

    Raises:
        InputError: nothing to forget, a mask of another model, a retain term without retain data, a state of
            another run, or a loss that is not a finite number; processes that were given different things.
        MaskLeak: a weight that must not move did.
    """
    return train(objective, model, EditData(forget, retain, text), mask, EditRun(folder, resume, log, ranks))


def train(objective: Objective, model: Model, data: EditData, mask: WeightMask, how: EditRun) -> WeightDelta:
    """`finetune`, with facts and texts as one value.

    Args:
        objective: The forget loss, the retain term, the training settings.
        model: The model to edit.
        data: Facts to forget, facts to keep, neutral text.
        mask: The weights that may move.
        how: Where states are saved, and which processes share the steps.
    """
    mask.check(model)
    training = objective.training
    processes = Processes.of(how.ranks, model)
    deltas = _deltas(model, mask, training, processes)
    with weights_unchanged(model.module) as base:
        encoded = Data.read(model, data, objective.retain, training)
        references = _references(objective.retain, model, deltas, processes, base)
        optimizer = make_optimizer(training, deltas.parameters)
        run = Run(objective, model, deltas, encoded, optimizer, references, processes)
        processes.agree(encoded, run.identity)
        state = run.start(how.folder if how.resume else None)
        how.ranks.agree("states to go on from (the output folder must be one that all see)", str(state.step))
        with (
            deltas.attached(),
            activation_checkpointing(model, training.checkpointing),
            progress.task("edit", total=training.steps) as line,
        ):
            for record in state.history:
                line.advance()
                if how.log is not None:
                    how.log(record)
            while not state.stopped:
                record = run.take_step(state)
                prob = record["forget_prob"]  # None where no example of the step has been measured yet
                line.advance(note="" if prob is None else f"forget p {prob:.3f}")
                if how.log is not None:
                    how.log(record)
                if how.folder is not None and (state.stopped or state.step % training.save_every == 0):
                    save_state(how.folder, run.identity, state, deltas.values, run.optimizer, how.ranks.first)
        if state.stopped == "utility floor":
            deltas.load(state.good)
        trained = weight_delta(model, mask, deltas, training, run.provenance(state))
    if references is not None:
        references.commit()
    return trained


def _deltas(model: Model, mask: WeightMask, training: Training, processes: Processes) -> Trained:
    """The trainable form of the mask that the settings ask for."""
    if training.lora_rank and processes.sharded:
        raise InputError(
            "LoRA does not work on a sharded model: train the located weights themselves (lora_rank 0)"
        )
    if training.lora_rank:
        return LoraDeltas(model.module, mask, training.lora_rank, training.seed)
    saved = saved_dtypes(model, mask) if training.rounding == "compensated" else None
    return Deltas(model.module, mask, saved)


def _references(
    term: Retain, model: Model, deltas: Trained, processes: Processes, base: Mapping[str, str]
) -> References | None:
    """The store of the base's states, or None where the base is asked at every step.

    A sharded base is asked every time: a state that one process has stored, the others would still have to compute
    together.

    Args:
        term: The retain term.
        model: The base.
        deltas: The trained values, to be silenced while the base is asked.
        processes: The processes of the run.
        base: Digests of the base's tensors.
    """
    if term.reference == "live" or processes.sharded:
        return None
    if term.reference == "disk":
        return References(model, deltas, cache_folder() / "references", base=base)
    return References(model, deltas, known=known_states(model.module, base), base=base)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the loop."""

    objective: Objective
    """Forget loss, retain term and settings."""
    model: Model
    """The frozen base; with the deltas attached, the edited model."""
    deltas: Trained
    """The trained values."""
    data: Data
    """Encoded examples and reference scores."""
    optimizer: torch.optim.Optimizer
    """The optimizer over the deltas."""
    references: References | None = None
    """The stored states of the base; None asks the base at every step."""
    processes: Processes = ONE_PROCESS
    """The processes that share every step."""

    @property
    def identity(self) -> str:
        """Digest of what the run is made of: settings, mask, data, and the model as it is read and asked."""
        return identity(
            settings_of(self.objective),
            self.data.fingerprint(),
            WeightMask(self.deltas.selections).digest,
            model_digests(self.model),
        )

    def start(self, folder: Path | None) -> RunState:
        """The state to go on from: the one in `folder`, or a fresh one."""
        if folder is not None:
            state = load_state(folder, self.identity, self.deltas.values, self.optimizer)
            if state is not None:
                return state
        return RunState.fresh(len(self.data.forget), self.deltas.values)

    def take_step(self, state: RunState) -> dict[str, Any]:
        """One optimizer step and, when due, a check of utility; sets `state.stopped` when the run is over.

        Returns:
            The step's record: `step`, `lr`, `forget_loss`, `forget_prob` (mean probability of the forget targets
            before the step), `forget_correct` (share top-1 then), `active` (share still pushed), `retain_loss`
            (unweighted), `kl` (nats per token on this step's retain data), `grad_norm` (before clipping), `utility`
            (share of the probe facts still right after the step, at checks). None stands for "not computed".
        """
        training, step = self.objective.training, state.step
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(training, step)
        if isinstance(self.optimizer, SophiaG) and step % HESSIAN_EVERY == 0:
            self._estimate_hessian(self.optimizer, step)
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, Any] = {"step": step + 1, "lr": lr_at(training, step), "utility": None}
        split = self.processes.split()
        record |= self._forget_backward(state, step, split)
        record |= self._retain_backward(step, split)
        record["grad_norm"] = self._clip(step)
        self.optimizer.step()
        state.step += 1
        record = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in record.items()}
        state.history.append(record)
        state.stopped = stop_reason(training, self.data, state)
        checking = state.step % training.check_every == 0
        if checking and state.step >= training.min_steps and isinstance(self.objective, Finishing):
            done = self.objective.done(self.model, self.data.forget)
            # The first process decides for all.
            state.stopped = state.stopped or (
                "goal" if self.processes.ranks.broadcast_object(str(done)) == "True" else ""
            )
        if state.stopped or checking:
            check_utility(self.model, training, self.data, state, self.deltas, self.processes)
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
            "unreached": [n for n, v in self.deltas.values.items() if not full_tensor(v.detach()).any()],
            "last": state.history[-1],
        }

    def _stored(self, encoded: Sequence[Encoded]) -> StoredLogits | None:
        """Reads the base's logits on batches of these examples from the store, if there is one."""
        references = self.references
        return None if references is None else lambda batch: references.logits(encoded, batch)

    def _forget_backward(self, state: RunState, step: int, split: WorkSplit) -> dict[str, Any]:
        """Backward of the forget loss, batch by batch; updates NLL and correctness of the examples in `state`."""
        data, training = self.data, self.objective.training
        plain = list(data.forget_batches(training, step))
        other = list(data.reworded_batches(training, step))
        chosen = [number for batch in plain for number in batch.examples]
        n_examples = len(chosen) + sum(len(batch.examples) for batch in other)
        loss_sum, n_active = 0.0, 0.0
        seen = torch.zeros(3, len(data.forget))
        for piece in split.pieces(data.forget, plain, training.batch_tokens):
            forget = self._forget(data.plain, piece.batch, step)
            loss, active = self._backward(data.plain, forget, n_examples, step, piece.counts)
            loss_sum, n_active = loss_sum + loss, n_active + active
            now = self._measured(forget, step)
            if now is not None and piece.counts:
                seen[:, list(piece.batch.examples)] = now
        for piece in split.pieces(data.reworded.encoded, other, training.batch_tokens):
            forget = self._forget(data.reworded, piece.batch, step)
            loss_sum += self._backward(data.reworded, forget, n_examples, step, piece.counts)[0]
        loss_sum, n_active = self.processes.all_reduce_sum(loss_sum, n_active)
        self.processes.ranks.all_reduce([seen])
        looked_at = seen[2] > 0
        state.nll[looked_at], state.correct[looked_at] = seen[0, looked_at], seen[1, looked_at]
        return {
            "forget_loss": loss_sum,
            "forget_prob": float((-state.nll[chosen]).exp().nanmean()),
            "forget_correct": float(state.correct[chosen].mean()),
            "active": n_active / len(chosen),
        }

    def _measured(self, forget: Prediction, step: int) -> Float[Tensor, "3 example"] | None:
        """NLL, correctness and a 1 for each example of a batch; None at steps that do not compute them."""
        if forget.has_run:
            nll, correct = forget.nll.detach().float().cpu(), forget.correct.float().cpu()
        elif step % self.objective.training.check_every == 0:
            encoded = [self.data.forget[i] for i in forget.batch.examples]
            scores = measure(self.model, encoded, self.objective.training.batch_tokens)
            nll, correct = scores.nll, scores.correct.float()
        else:
            return None
        return torch.stack([nll, correct, torch.ones_like(nll)])

    def _backward(
        self, asked: ForgetExamples, forget: Prediction, n_examples: int, step: int, counts: bool
    ) -> tuple[float, int]:
        """Backward of the forget loss of one of a step's batches.

        Examples that are forgotten already get no push. A batch that does not count has weight 0.

        Args:
            asked: The examples that `forget` numbers.
            forget: The batch under the edited model.
            n_examples: Forget examples in the whole step, on all processes.
            step: Counted from 0.
            counts: False where the batch is run only because other processes run one.

        Returns:
            The batch's share of the step's loss, and how many of its examples were pushed.
        """
        training = self.objective.training
        active = self._active(forget)
        counts = counts and bool(active.any())
        if not self.processes.any(counts):
            return 0.0, 0
        pushed = forget if not counts or active.all() else forget.only(active)
        if training.attack.steps:
            pushed = pushed.under(training.attack.worst_perturbation(self.model, pushed.batch))
        loss = self.objective.forget_loss(pushed) * (counts * pushed.n_examples / n_examples)
        named = ((asked.facts[i].id, asked.encoded[i]) for i in pushed.batch.examples)
        number = self._finite("forget loss", step, loss, named)
        loss.backward()
        return number, int(active.sum()) if counts else 0

    def _forget(self, asked: ForgetExamples, batch: Batch, step: int) -> Prediction:
        """A batch of forget examples, with another answer to the same prompts where the objective has one."""
        objective, pool = self.objective, [*self.data.facts, *self.data.kept_facts]

        def answer(numbers: Sequence[int]) -> Prediction:
            assert isinstance(objective, Answering)
            others = [objective.answer(asked.facts[i], pool, step) for i in numbers]
            encoded = [encode(self.model, other) for other in others]
            batch = collate(encoded, range(len(encoded)))
            return Prediction(self.model, self.deltas, batch, stored=self._stored(encoded))

        other = answer if isinstance(objective, Answering) else None
        stored = self._stored(asked.encoded)
        return Prediction(self.model, self.deltas, batch, asked.reference.nll, other, stored)

    def _active(self, forget: Prediction) -> Bool[Tensor, " example"]:
        """Which examples are still pushed: those not improbable yet, or not improbable through this edit."""
        floor = self.objective.training.floor
        if not floor:
            return torch.ones(forget.n_examples, dtype=torch.bool)
        nll = forget.nll.detach()
        risen = nll - forget.ref_nll.to(nll.device) >= RISE * forget.n_tokens
        return ~((nll > -math.log(floor)) & risen)

    def _retain_backward(self, step: int, split: WorkSplit) -> dict[str, Any]:
        """Backward of the retain term on this step's facts and texts, each a mean over its tokens."""
        term, training = self.objective.retain, self.objective.training
        if not term.active:
            return {"retain_loss": None, "kl": None}
        loss_sum, kl_sum, n_labels = 0.0, 0.0, 0
        data = self.data
        for encoded, source in ((data.retain, data.retain_batches), (data.texts, data.text_batches)):
            batches = list(source(term, training, step))
            n = sum(len(batch.labels) for batch in batches)
            for piece in split.pieces(encoded, batches, training.batch_tokens):
                kept = Prediction(self.model, self.deltas, piece.batch, stored=self._stored(encoded))
                n_own = len(piece.batch.labels) if piece.counts else 0
                loss = retain_loss(self.objective, kept) * (n_own / n)
                named = ((f"retain {i + 1}", encoded[i]) for i in piece.batch.examples)
                loss_sum += self._finite("retain loss", step, loss, named)
                (term.weight * loss).backward()
                kl_sum += mean_kl(kept) * n_own
            n_labels += n
        loss_sum, kl_sum = self.processes.all_reduce_sum(loss_sum, kl_sum)
        return {"retain_loss": loss_sum, "kl": kl_sum / n_labels}

    def _clip(self, step: int) -> float:
        """Clip the gradient of all deltas together; its norm before that."""
        most = self.objective.training.clip or math.inf
        with_gradient = self.processes.all_reduce_gradients(self.deltas.parameters)
        if step == 0 and not with_gradient:
            raise InputError(
                "no located weight influences the loss: the mask lies above the layers this objective runs, or in "
                "parameters the model does not use"
            )
        return self._finite("gradient norm", step, self.processes.clip_(with_gradient, most))

    def _finite(
        self, what: str, step: int, value: Tensor, examples: Iterable[tuple[str, Encoded]] = ()
    ) -> float:
        """The value as a finite number.

        Args:
            what: Name of the value, for the error.
            step: Counted from 0.
            value: A scalar.
            examples: Names and tokens of the examples it is computed from.

        Raises:
            InputError: it is not finite; names the example and the layer where that arises first.
        """
        number = float(value.detach())
        if math.isfinite(number):
            return number
        # No process can run a sharded model alone.
        found = None if self.processes.sharded else first_at_fault(self.model, examples)
        where = "" if found is None else f"; it arises in {found[1]}, of fact {found[0]!r} first"
        raise InputError(
            f"step {step + 1}: the {what} is {number}; lower the learning rate (now "
            f"{lr_at(self.objective.training, step):g}) or load the model in float32{where}"
        )

    def _over_forgotten(self, state: RunState) -> list[str]:
        """Facts whose target is now less probable than a random token string of its length."""
        chance = math.log(self.model.atlas.d_vocab) * self.data.reference.n_tokens
        flags = (state.nll > chance).tolist()
        return [fact.id for fact, flag in zip(self.data.facts, flags, strict=True) if flag]

    def _estimate_hessian(self, optimizer: SophiaG, step: int) -> None:
        term, training, data = self.objective.retain, self.objective.training, self.data
        asked = {"forget": (data.forget, list(data.forget_batches(training, step)))}
        if term.active:
            asked["retain"] = (data.retain, list(data.retain_batches(term, training, step)))
        estimate_hessian(optimizer, self.model, self.deltas, self.processes, asked, training, step)
