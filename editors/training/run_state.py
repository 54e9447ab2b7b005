"""The state of a training run, saved so that a resumed run gives the same bits as an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood, value_of
from locus.parallel.sharding import full_tensor, laid_out_as

KIND = "edit-state"
FILE = "state.safetensors"


@dataclass
class RunState:
    """Everything that the next step depends on, except the settings, the deltas and the optimizer."""

    nll: Tensor
    """NLL of each forget example when it was last seen, in nats; NaN before that. [example]"""
    correct: Tensor
    """1 where it was top-1 then, else 0. [example]"""
    good: dict[str, Tensor]
    """Deltas at the last check with utility above its floor."""
    good_step: int = 0
    """Steps taken at that check."""
    bad_looks: int = 0
    """Consecutive checks with utility below its floor."""
    step: int = 0
    """Steps taken."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per step taken."""
    stopped: str = ""
    """Why the run ended ("steps", "goal", "utility floor"); empty while it goes on."""

    @classmethod
    def fresh(cls, n_forget: int, deltas: Mapping[str, nn.Parameter]) -> RunState:
        """Before the first step."""
        nothing_seen = torch.full((n_forget,), float("nan"))
        good = {name: value.detach().clone() for name, value in deltas.items()}
        return cls(nll=nothing_seen, correct=torch.ones(n_forget), good=good)


def identity(*parts: Any) -> str:
    """sha256 of what a run is made of: a state may only be resumed by the same run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def save_state(
    folder: Path,
    run: str,
    state: RunState,
    deltas: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    write: bool = True,
) -> None:
    """Write the state atomically. Every process of a run calls this; one of them writes.

    Args:
        folder: Where the file goes.
        run: Identity of the run.
        state: What is written.
        deltas: The trained values.
        optimizer: Its state is written too.
        write: Whether this process writes.
    """
    tensors = {f"delta/{name}": full_tensor(value.detach()) for name, value in deltas.items()}
    tensors |= {f"good/{name}": full_tensor(value) for name, value in state.good.items()}
    tensors |= {"nll": state.nll, "correct": state.correct}
    numbers: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{slot}"] = full_tensor(value)
            elif value is not None:
                numbers[f"{index}/{slot}"] = value
    meta = {
        "run": run,
        "step": state.step,
        "history": state.history,
        "good_step": state.good_step,
        "bad_looks": state.bad_looks,
        "stopped": state.stopped,
        "optimizer": numbers,
    }
    if write:
        save_tensors(folder / FILE, KIND, {k: v.cpu().contiguous() for k, v in tensors.items()}, meta)


@torch.no_grad()
def load_state(
    folder: Path, run: str, deltas: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> RunState | None:
    """Restore what `save_state` wrote; None when there is nothing to resume.

    Args:
        folder: Where the file is.
        run: Identity of the run that resumes.
        deltas: The trained values; set in place.
        optimizer: Its state is set.

    Raises:
        InputError: the state belongs to a run with other settings, mask, facts or model.
    """
    path = folder / FILE
    if not path.exists():
        return None
    tensors, meta = load_tensors(path, KIND)
    if meta.get("run") != run:
        raise InputError(
            f"{path}: begun with other settings, mask, facts or another model; use a new folder or do not resume"
        )
    with understood(path, "state of an edit", "begin again without --resume"):
        return _restored(tensors, meta, deltas, optimizer)


def _restored(
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    deltas: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> RunState:
    for name, value in deltas.items():
        value.copy_(laid_out_as(value, tensors[f"delta/{name}"]))
    parameters = list(deltas.values())
    slots: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, index, slot = key.split("/")
            like = parameters[int(index)]
            fits = tensor.shape == like.shape
            slots.setdefault(int(index), {})[slot] = laid_out_as(like, tensor) if fits else tensor
    for key, number in meta["optimizer"].items():
        index, slot = key.split("/")
        slots.setdefault(int(index), {})[slot] = number
    if slots:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    good = {name: laid_out_as(value, tensors[f"good/{name}"]) for name, value in deltas.items()}
    numbers = {name: value_of(int, meta[name], name) for name in ("good_step", "bad_looks", "step")}
    history = value_of(tuple[Mapping[str, Any], ...], meta["history"], "history")
    stopped = value_of(str, meta["stopped"], "stopped")
    return RunState(
        nll=tensors["nll"],
        correct=tensors["correct"],
        good=good,
        history=list(history),
        stopped=stopped,
        **numbers,
    )
