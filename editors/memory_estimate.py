"""Estimate the peak memory of a trained edit before it runs.

One training step of the real code (the editor's loss, the deltas, the optimizer) runs on torch's fake tensors, which
have shapes and no data, and every storage is counted from its allocation to its release. The estimate therefore
includes what the mask saves: no gradients outside the mask, no activations below the lowest located layer, recomputed
activations. No weights are read, so the estimate also runs on a machine too small for the model.

Not included: memory that kernels allocate and free internally, the allocator's fragmentation, the CUDA context.
benchmarks/README.md compares estimates with measurements.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from editors.editor import EditData, Editor
from editors.training.activation_checkpointing import activation_checkpointing
from editors.training.live_bytes import LiveBytes
from editors.training.objective import Objective, TrainsInStages, retain_loss
from editors.training.parametrize import Deltas, Trained
from editors.training.prediction import Prediction
from editors.training.reference import MOST_BYTES
from editors.training.retain import Retain
from editors.training.rounding import saved_dtypes
from editors.training.settings import Training, make_optimizer
from locus.errors import InputError
from locus.forward import Batch, batches
from locus.hooks import patched
from locus.mask import WeightMask
from locus.model import Model
from locus.tokens import Encoded, encode, encode_text


@dataclass(frozen=True)
class ForwardSize:
    """Size of one forward and backward."""

    rows: int
    """Examples."""
    width: int
    """Padded tokens per example."""
    labels: int
    """Target tokens of all examples together."""

    @classmethod
    def of(cls, batch: Batch) -> ForwardSize:
        """The size of a batch."""
        rows, width = batch.ids.shape
        return cls(rows, width, len(batch.labels))


@dataclass(frozen=True)
class LargestForwards:
    """The largest forwards of a run."""

    forget: tuple[ForwardSize, ...] = (ForwardSize(16, 24, 48),)
    """Batches of forget examples; by default 16 facts of 24 tokens, 3 of them target tokens."""
    retain: tuple[ForwardSize, ...] = (ForwardSize(16, 24, 48),)
    """Batches of retain facts."""
    text: tuple[ForwardSize, ...] = (ForwardSize(1, 512, 511),)
    """Batches of neutral text; by default one full block."""
    kept_labels: int = 0
    """Target tokens whose reference states are stored by the end of the run."""

    @classmethod
    def of(cls, model: Model, editor: Editor, data: EditData) -> LargestForwards:
        """From the longest examples that one step can draw; nothing is run.

        Args:
            model: Its tokenizer and context length are used.
            editor: A trained editor.
            data: Facts to forget, facts to keep (those held out do not count), neutral text.

        Raises:
            InputError: an example that cannot be encoded.
        """
        objective = trained_objective(editor)
        training, term = objective.training, objective.retain
        facts = [encode(model, fact) for fact in data.forget]
        kept = [encode(model, fact) for fact in data.trainable_retain] if term.active else []
        blocks = [block for paragraph in data.text for block in encode_text(model, paragraph)]
        blocks = blocks if term.active else []
        seen = [*kept, *blocks] if term.reference == "memory" and term.term == "kl" else []
        most = training.steps * (term.facts + term.texts)
        labels = sorted((one.n_target for one in seen), reverse=True)
        return cls(
            forget=_largest(facts, training.forget_per_step, training.batch_tokens),
            retain=_largest(kept, term.facts, training.batch_tokens),
            text=_largest(blocks, term.texts, training.batch_tokens),
            kept_labels=sum(labels[:most]),
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each kind at the peak of a run."""

    weights: int
    """Parameters and buffers of the frozen base; tied tensors once."""
    deltas: int
    """Trained values, the copy kept from the last good check, and their indices."""
    gradients: int
    """Gradients of the trained values."""
    optimizer: int
    """Optimizer state."""
    activations: int
    """Activations that the blocks keep for the backward pass."""
    transient: int
    """Everything else at the peak: float32 logits, losses, gradients of activations."""
    references: int
    """Stored states of the base, in host memory."""

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return sum(getattr(self, name) for name in _ON_DEVICE)

    def to_json(self) -> dict[str, int]:
        """Bytes by name."""
        return {**dataclasses.asdict(self), "peak": self.peak}

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in (*_ON_DEVICE, "peak", "references")]
        return "\n".join(f"{name:<12}{n_bytes / 1e6:12,.1f} MB" for name, n_bytes in rows)

    @classmethod
    def of(
        cls, model: Model, mask: WeightMask, editor: Editor, loads: LargestForwards = LargestForwards()
    ) -> MemoryEstimate:
        """Run one step of an edit on fake tensors.

        Args:
            model: The base, or its shape: a model on the meta device is as good (`locus.model.load_shape`).
            mask: The weights that may move.
            editor: A trained editor: its settings say which optimizer, whether activations are computed again.
            loads: The largest forwards of the run.

        Raises:
            InputError: an editor that trains nothing or through LoRA, a mask of another model, or a model whose
                forward looks at values.
        """
        mask.check(model, strict=False)
        objective = trained_objective(editor)
        with FakeTensorMode(allow_non_fake_inputs=True):
            shape = dataclasses.replace(model, module=_without_data(model.module))
            try:
                return _step(shape, _trained(shape, mask, objective.training), objective, loads)
            except torch._subclasses.fake_tensor.DataDependentOutputException as error:
                raise InputError(
                    f"{model.name}: its forward decides by values ({error.func}), so its memory cannot be estimated"
                ) from error


_ON_DEVICE = ("weights", "deltas", "gradients", "optimizer", "activations", "transient")


def _step(model: Model, deltas: Trained, objective: Objective, loads: LargestForwards) -> MemoryEstimate:
    """One training step while storages are counted."""
    term: Retain = objective.retain
    training: Training = objective.training
    counted = LiveBytes()
    with counted, deltas.attached(), activation_checkpointing(model, training.checkpointing):
        weights = counted.count([*model.module.parameters(), *model.module.buffers()])
        held = [value.detach().clone() for value in deltas.values.values()]
        counted.count([*deltas.parameters, *held])
        values = counted.now - weights
        optimizer = make_optimizer(training, deltas.parameters)
        for value in deltas.parameters:
            value.grad = torch.zeros_like(value)
        gradients = _bytes([value.grad for value in deltas.parameters])
        optimizer.step()
        state = _bytes([v for slots in optimizer.state.values() for v in slots.values()])
        counted.reset_peak()
        activations = 0
        batches_of = {"forget": loads.forget, "retain": loads.retain, "text": loads.text}
        for kind in batches_of:
            for load in batches_of[kind] if kind == "forget" or term.active else ():
                activations = max(activations, _backward(model, deltas, objective, kind, load, counted))
        torch.nn.utils.clip_grad_norm_(deltas.parameters, training.clip or float("inf"))
        optimizer.step()
    seen = weights + values + gradients + state
    return MemoryEstimate(
        weights=weights,
        deltas=values + _bytes([selection.index for selection in deltas.selections.values()]),
        gradients=gradients,
        optimizer=state,
        activations=activations,
        transient=counted.peak - seen - activations,
        references=min(MOST_BYTES, model.dtype.itemsize * model.atlas.d_model * loads.kept_labels),
    )


def _backward(
    model: Model, deltas: Trained, objective: Objective, kind: str, load: ForwardSize, counted: LiveBytes
) -> int:
    """Forward and backward of one batch.

    Args:
        model: The model on fake tensors.
        deltas: The trained values, attached.
        objective: Its forget loss and retain term.
        kind: "forget", "retain" or "text".
        load: Size of the batch.
        counted: The running count.

    Returns:
        Bytes that the blocks kept for the backward pass.
    """
    before, most = counted.now, 0

    def note(_: Tensor) -> None:
        nonlocal most
        if torch.is_grad_enabled():
            most = max(most, counted.now - before)

    term: Retain = objective.retain
    with patched(model.module, outputs=dict.fromkeys(model.atlas.blocks, note)):
        if kind == "forget":
            loss = objective.forget_loss(_prediction(model, deltas, load, answered=True))
        else:
            kept = _prediction(model, deltas, load, kept=term.reference != "live")
            loss = term.weight * retain_loss(objective, kept)
    loss.backward()
    return most


def _prediction(
    model: Model, deltas: Trained, load: ForwardSize, answered: bool = False, kept: bool = False
) -> Prediction:
    """A batch of this size, with a batch of other answers of the same size."""
    batch = _batch(load)
    d_vocab = model.atlas.d_vocab
    return Prediction(
        model,
        deltas,
        batch,
        torch.zeros(load.rows) if answered else None,
        (lambda _: _prediction(model, deltas, load)) if answered else None,
        (lambda b: torch.zeros(len(b.labels), d_vocab)) if kept else None,
    )


def _batch(load: ForwardSize) -> Batch:
    ids = torch.zeros(load.rows, load.width, dtype=torch.long)
    labels = torch.zeros(load.labels, dtype=torch.long)
    return Batch(
        ids, torch.ones_like(ids), labels, labels, labels, labels, tuple(range(load.rows)), labels > 0
    )


def _largest(encoded: Sequence[Encoded], n: int, batch_tokens: int) -> tuple[ForwardSize, ...]:
    """The widest batch of the `n` longest examples, and the one with the most target tokens."""
    longest = sorted(encoded, key=lambda one: len(one.ids), reverse=True)[:n]
    loads = [ForwardSize.of(batch) for batch in batches(longest, batch_tokens)]
    if not loads:
        return ()
    widest = max(loads, key=lambda load: (load.rows * load.width, load.labels))
    fullest = max(loads, key=lambda load: (load.labels, load.rows * load.width))
    return (widest,) if widest == fullest else (widest, fullest)


def trained_objective(editor: Editor) -> Objective:
    """The objective that the loop trains; of an editor in stages, one with the forwards of the largest.

    Raises:
        InputError: the editor trains nothing.
    """
    if isinstance(editor, Objective):
        return editor
    if isinstance(editor, TrainsInStages):
        return editor.largest_stage()
    raise InputError(f"{type(editor).__name__} trains nothing: only trained edits have a memory estimate")


def _trained(model: Model, mask: WeightMask, training: Training) -> Trained:
    """The located weights' own deltas.

    Raises:
        InputError: LoRA, whose layers peft cannot build without data.
    """
    if training.lora_rank:
        raise InputError("there is no memory estimate for LoRA: set lora_rank to 0")
    return Deltas(
        model.module, mask, saved_dtypes(model, mask) if training.rounding == "compensated" else None
    )


def _without_data(module: Any) -> Any:
    """The module with fake tensors for its parameters and buffers, tied ones still tied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
        )
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(module, memo)


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))
