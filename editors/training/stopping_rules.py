"""When a training run ends: the facts are forgotten, utility is below its floor, or the steps are used up."""

from __future__ import annotations

import torch

from editors.training.data import Data
from editors.training.parametrize import Trained
from editors.training.processes import Processes
from editors.training.run_state import RunState
from editors.training.settings import Training
from locus.model import Model

RISE = 1.0
"""Nats per token by which a target's NLL must rise to count as forgotten, even one improbable from the start."""
PATIENCE = 2
"""Consecutive checks below the floor that end a run; a single one may be a dip that later steps repair."""
KL_WINDOW = 5
"""Steps over which the KL is averaged before it is compared with `Training.max_kl`."""


def stop_reason(training: Training, data: Data, state: RunState) -> str:
    """Why the run should end now, by forgetting or by the number of steps; empty when it should go on."""
    if state.step >= max(1, training.min_steps) and not torch.isnan(state.nll).any():
        rise = (state.nll - data.reference.nll) / data.reference.n_tokens
        forgotten = (-state.nll).exp().mean() < training.goal and not state.correct.any()
        if forgotten and rise.mean() >= RISE:
            return "goal"
    return "steps" if state.step >= training.steps else ""


def check_utility(
    model: Model, training: Training, data: Data, state: RunState, deltas: Trained, processes: Processes
) -> None:
    """Measure utility; keep a copy of the deltas while it holds, stop the run when it does not.

    Sets `utility` in the latest record. After `PATIENCE` consecutive checks below the floor, or one at the run's end,
    `state.stopped` is "utility floor", and the run returns the last deltas whose utility held.

    Args:
        model: The edited model: deltas attached.
        training: Floor, KL ceiling and batch size.
        data: The retain facts that are probed.
        state: The run so far; changed.
        deltas: The trained values.
        processes: The processes of the run.
    """
    record = state.history[-1]
    recent = [r["kl"] for r in state.history[-KL_WINDOW:] if r["kl"] is not None]
    holds = not (training.max_kl and recent) or sum(recent) / len(recent) <= training.max_kl
    if data.probe and training.utility:
        share = float(processes.measure(model, data.probe, training.batch_tokens).correct.float().mean())
        record["utility"] = share
        holds = holds and share >= training.utility
    if holds:
        state.good = {name: value.detach().clone() for name, value in deltas.values.items()}
        state.good_step, state.bad_looks = state.step, 0
        return
    state.bad_looks += 1
    if state.bad_looks >= PATIENCE or state.stopped:
        state.stopped = "utility floor"
