"""The memory that a trained edit will take, before it runs.

One step of the real code (the editor's own loss, the deltas, the optimizer) is gone through on tensors that have
shapes and no data (torch's fake tensors), while every storage that operators make is counted until it dies. So the
account knows what the mask spares: no gradient of a weight outside it, nothing kept below the lowest located layer,
activations that are computed again. It needs no weights, and no machine that could hold them.

Not in it: what kernels take and give back within themselves, an allocator's waste, and the CUDA context. How far it
is off where it can be measured: benchmarks/README.md.
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

from editors.training.activation_checkpointing import recomputed
from editors.training.live_bytes import LiveBytes
from editors.training.parametrize import Deltas, Trained
from editors.training.prediction import Prediction
from editors.training.reference import MOST_BYTES
from editors.training.retain import Retain
from editors.training.rounding import saved_dtypes
from editors.training.settings import Training, make_optimizer
from editors.two_stage.reinforcement import Reinforce
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import Batch, batches
from locus.hooks import patched
from locus.mask import WeightMask
from locus.model import Model
from locus.tokens import Encoded, encode, encode_text


@dataclass(frozen=True)
class Load:
    """The size of one forward and backward."""

    rows: int
    """Examples."""
    width: int
    """Padded tokens of each."""
    labels: int
    """Target tokens of all of them together."""

    @classmethod
    def of(cls, batch: Batch) -> Load:
        """The size of a batch."""
        rows, width = batch.ids.shape
        return cls(rows, width, len(batch.labels))


@dataclass(frozen=True)
class Loads:
    """The largest forwards of a run."""

    forget: tuple[Load, ...] = (Load(16, 24, 48),)
    """Of forget examples; by default 16 facts of 24 tokens, 3 of them the target's."""
    retain: tuple[Load, ...] = (Load(16, 24, 48),)
    """Of retain facts."""
    text: tuple[Load, ...] = (Load(1, 512, 511),)
    """Of neutral text; by default one full block."""
    kept_labels: int = 0
    """Target tokens whose reference states end up kept."""

    @classmethod
    def of(
        cls, model: Model, editor: Any, forget: Sequence[Fact], retain: Sequence[Fact], text: Sequence[str]
    ) -> Loads:
        """Of the longest examples that a step could draw together; nothing is run.

        Raises:
            InputError: an example that cannot be encoded.
        """
        training, term = _objective(editor).training, _objective(editor).retain
        facts = [encode(model, fact) for fact in forget]
        kept = [encode(model, fact) for fact in retain if not fact.held_out] if term.active else []
        blocks = [block for paragraph in text for block in encode_text(model, paragraph)]
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
class Account:
    """Bytes of each kind, when the run takes most."""

    weights: int
    """The frozen base, tied tensors once."""
    deltas: int
    """The trained values, the copy of those that held last, and where they belong."""
    gradients: int
    """Of the trained values."""
    optimizer: int
    """Its state."""
    activations: int
    """What the blocks keep for the backward pass."""
    transient: int
    """What the worst moment needs besides: float32 logits, losses, gradients of activations."""
    references: int
    """Kept states of the base, in the host's memory."""

    @property
    def peak(self) -> int:
        """Most bytes on the device at once."""
        return sum(getattr(self, name) for name in _ON_DEVICE)

    def to_json(self) -> dict[str, int]:
        """Bytes by name."""
        return {**dataclasses.asdict(self), "peak": self.peak}

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in (*_ON_DEVICE, "peak", "references")]
        return "\n".join(f"{name:<12}{n_bytes / 1e6:12,.1f} MB" for name, n_bytes in rows)

    @classmethod
    def of(cls, model: Model, mask: WeightMask, editor: Any, loads: Loads = Loads()) -> Account:
        """Go through one step of an edit without data.

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
        objective = _objective(editor)
        with FakeTensorMode(allow_non_fake_inputs=True):
            shape = dataclasses.replace(model, module=_without_data(model.module))
            try:
                return _step(shape, _trained(shape, mask, objective.training), objective, loads)
            except torch._subclasses.fake_tensor.DataDependentOutputException as error:
                raise InputError(
                    f"{model.name}: its forward decides by values ({error.func}), so there is no account of it"
                ) from error


_ON_DEVICE = ("weights", "deltas", "gradients", "optimizer", "activations", "transient")


def _step(model: Model, deltas: Trained, objective: Any, loads: Loads) -> Account:
    """One step under the count."""
    term: Retain = objective.retain
    training: Training = objective.training
    counted = LiveBytes()
    with counted, deltas.attached(), recomputed(model, training.checkpointing):
        weights = counted.hold([*model.module.parameters(), *model.module.buffers()])
        held = [value.detach().clone() for value in deltas.values.values()]
        counted.hold([*deltas.parameters, *held])
        values = counted.now - weights
        optimizer = make_optimizer(training, deltas.parameters)
        for value in deltas.parameters:
            value.grad = torch.zeros_like(value)
        gradients = _bytes([value.grad for value in deltas.parameters])
        optimizer.step()
        state = _bytes([v for slots in optimizer.state.values() for v in slots.values()])
        counted.forget_peak()
        activations = 0
        for kind in ("forget", "retain", "text"):
            for load in getattr(loads, kind) if kind == "forget" or term.active else ():
                activations = max(activations, _backward(model, deltas, objective, kind, load, counted))
        torch.nn.utils.clip_grad_norm_(deltas.parameters, training.clip or float("inf"))
        optimizer.step()
    seen = weights + values + gradients + state
    return Account(
        weights=weights,
        deltas=values + _bytes([selection.index for selection in deltas.selections.values()]),
        gradients=gradients,
        optimizer=state,
        activations=activations,
        transient=counted.peak - seen - activations,
        references=min(MOST_BYTES, model.dtype.itemsize * model.atlas.d_model * loads.kept_labels),
    )


def _backward(
    model: Model, deltas: Trained, objective: Any, kind: str, load: Load, counted: LiveBytes
) -> int:
    """Forward and backward of one batch; what its blocks kept for the backward pass."""
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
            loss = term.weight * term.loss(kept)
    loss.backward()
    return most


def _prediction(
    model: Model, deltas: Trained, load: Load, answered: bool = False, kept: bool = False
) -> Prediction:
    """A batch of this size, and another of it for the other answers."""
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


def _batch(load: Load) -> Batch:
    ids = torch.zeros(load.rows, load.width, dtype=torch.long)
    labels = torch.zeros(load.labels, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), labels, labels, labels, labels, tuple(range(load.rows)))


def _largest(encoded: Sequence[Encoded], n: int, batch_tokens: int) -> tuple[Load, ...]:
    """The widest batch and the one with most targets, of the `n` longest examples."""
    longest = sorted(encoded, key=lambda one: len(one.ids), reverse=True)[:n]
    loads = [Load.of(batch) for batch in batches(longest, batch_tokens)]
    if not loads:
        return ()
    widest = max(loads, key=lambda load: (load.rows * load.width, load.labels))
    fullest = max(loads, key=lambda load: (load.labels, load.rows * load.width))
    return (widest,) if widest == fullest else (widest, fullest)


def _objective(editor: Any) -> Any:
    """What the loop trains; of a method in two stages, one with the same forwards."""
    if hasattr(editor, "forget_loss"):
        return editor
    if not hasattr(editor, "training"):
        raise InputError(f"{type(editor).__name__} trains nothing: an account is given of trained edits")
    return Reinforce(getattr(editor, "retain", Retain(term="none")), editor.training)


def _trained(model: Model, mask: WeightMask, training: Training) -> Trained:
    """The located weights' own deltas.

    Raises:
        InputError: LoRA, whose layers peft cannot build without data.
    """
    if training.lora_rank:
        raise InputError(
            "an account is given of located weights that train themselves, not of LoRA: leave lora_rank at 0"
        )
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
