"""When a training run ends: the facts are gone, utility has fallen below its floor, or the steps are over."""

from __future__ import annotations

import torch

from editors.training.data import Data
from editors.training.parametrize import Trained
from editors.training.processes import Team
from editors.training.run_state import RunState
from editors.training.settings import Training
from locus.model import Model

RISE = 1.0
"""A target that was improbable from the start counts as gone only after its NLL rose by this, in nats a token."""
PATIENCE = 2
"""Looks in a row below the floor that end a run: forgetting often dips before the later steps repair."""
KL_WINDOW = 5
"""Steps whose KL is averaged before it is held against its ceiling."""


def verdict(training: Training, data: Data, state: RunState) -> str:
    """Why the run should end now, by forgetting or by the number of steps; empty when it should go on."""
    if state.step >= max(1, training.min_steps) and not torch.isnan(state.nll).any():
        rise = (state.nll - data.reference.nll) / data.reference.n_tokens
        gone = (-state.nll).exp().mean() < training.goal and not state.correct.any()
        if gone and rise.mean() >= RISE:
            return "goal"
    return "steps" if state.step >= training.steps else ""


def look(model: Model, training: Training, data: Data, state: RunState, deltas: Trained, team: Team) -> None:
    """Measure utility; remember the deltas while it holds, end the run when it does not.

    Sets `utility` in the latest record. Below the floor `PATIENCE` looks in a row, or at the run's end, the run
    is stopped by "utility floor", and the last deltas that held are what it gives.
    """
    record = state.history[-1]
    recent = [r["kl"] for r in state.history[-KL_WINDOW:] if r["kl"] is not None]
    holds = not (training.max_kl and recent) or sum(recent) / len(recent) <= training.max_kl
    if data.probe and training.utility:
        share = float(team.measure(model, data.probe, training.batch_tokens).correct.float().mean())
        record["utility"] = share
        holds = holds and share >= training.utility
    if holds:
        state.good = {name: value.detach().clone() for name, value in deltas.values.items()}
        state.good_step, state.bad_looks = state.step, 0
        return
    state.bad_looks += 1
    if state.bad_looks >= PATIENCE or state.stopped:
        state.stopped = "utility floor"
