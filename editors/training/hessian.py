"""Sophia's diagonal estimate of the Hessian: squared gradients of the NLL of labels drawn from the model itself.

Gauss-Newton-Bartlett (Liu et al. 2023, arXiv:2305.14342, algorithm 2). Each example's draws depend on the seed, the
step and the example alone, not on what it is computed beside or by which process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from editors.training.parametrize import Trained
from editors.training.prediction import Prediction
from editors.training.processes import Processes
from editors.training.settings import Training
from editors.training.sophia import SophiaG
from locus.forward import Batch
from locus.metrics import token_nll
from locus.model import Model
from locus.random_streams import generator
from locus.tokens import Encoded

EVERY = 10
"""Steps between two estimates (Jia et al. 2024)."""


def estimate_hessian(
    optimizer: SophiaG,
    model: Model,
    deltas: Trained,
    processes: Processes,
    asked: Mapping[str, tuple[Sequence[Encoded], Sequence[Batch]]],
    training: Training,
    step: int,
) -> None:
    """Fold an estimate on a step's examples into the optimizer's; all processes of the run call it.

    Args:
        optimizer: Sophia, over the deltas.
        model: With the deltas attached.
        deltas: Where the gradients go.
        processes: The processes of the run.
        asked: Kind of example -> all of that kind, and the step's batches of them.
        training: The seed, and the size of a batch.
        step: Counted from 0.
    """
    n = sum(len(batch.labels) for _, batches in asked.values() for batch in batches)
    optimizer.zero_grad(set_to_none=True)
    split = processes.split()
    for kind, (encoded, batches) in asked.items():
        for piece in split.pieces(encoded, batches, training.batch_tokens):
            logits = Prediction(model, deltas, piece.batch).logits
            drawn = _drawn(logits.detach().softmax(-1).cpu(), piece.batch, training.seed, kind, step)
            loss = token_nll(logits, drawn).sum()
            (piece.counts * loss / n).backward()
    processes.all_reduce_gradients(deltas.parameters)
    optimizer.update_hessian(n)


def _drawn(
    probs: Float[Tensor, "label d_vocab"], batch: Batch, seed: int, kind: str, step: int
) -> Int[Tensor, " label"]:
    drawn = torch.empty(len(probs), dtype=torch.long)
    for number in batch.examples:
        own = batch.example == number
        source = generator(seed, f"hessian/{kind}/{number}", step)
        drawn[own] = torch.multinomial(probs[own], 1, generator=source).flatten()
    return drawn
