"""How deep it is erased: hidden states of the edited model patched into the base (Lee et al. 2026, arXiv:2605.24614).

Where the base still answers from the edited model's states of a layer, the knowledge is in them. The drop of the
target's log-probability is measured layer by layer at the positions that predict the target. The Unlearning
Depth Score weighs it by the drop that a model retrained without the facts causes; without such a model there is
no score, only the drop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locus.audit.context import Context
from locus.audit.figure_values import Curve, FigureValues
from locus.audit.intervals import Items
from locus.audit.state import State
from locus.forward import Batch, batches, label_logits, label_nll
from locus.hooks import patched, record
from locus.model import Model
from locus.tokens import Encoded

THRESHOLD = 0.05
"""Layers where the retrained model causes a smaller drop (nats a token) do not hold the knowledge."""


def run(state: State, context: Context) -> FigureValues:
    """Drop of log p(target) per token by patching, layer by layer, and the score where a retrained model is given."""
    if state.role == "base":
        return FigureValues()
    forget = context.questions["forget"]
    drop = drops(context.base, state, forget.encoded, context.max_tokens)
    found = {"depth.drop": Items(forget.facts, drop.mean(1))}
    by_layer = tuple(Items(forget.facts, drop[:, layer]) for layer in range(drop.shape[1]))
    curve = Curve("layer", tuple(map(float, range(len(by_layer)))), by_layer)
    if context.never_knew is not None:
        reference = drops(context.base, context.never_knew, forget.encoded, context.max_tokens)
        scores, known = depth_score(drop, reference)
        kept = tuple(f for f, k in zip(forget.facts, known.tolist(), strict=True) if k)
        found["depth.erased"] = Items(kept, scores[known])
    return FigureValues(found, curves={"depth": curve})


def depth_score(
    drop: Float[Tensor, "fact layer"], reference: Float[Tensor, "fact layer"], threshold: float = THRESHOLD
) -> tuple[Float[Tensor, " fact"], Tensor]:
    """UDS: sum over knowing layers of reference * clip(drop / reference, 0, 1), over the sum of reference.

    Returns:
        The score of each fact, and whether it has one (some layer knows it).
    """
    knows = reference > threshold
    weight = torch.where(knows, reference, 0.0)
    erased = torch.where(knows, torch.minimum(drop.clamp_min(0), reference), 0.0)
    total = weight.sum(1)
    return erased.sum(1) / total.clamp_min(1e-12), total > 0


def drops(
    base: State, source: State, encoded: Sequence[Encoded], max_tokens: int
) -> Float[Tensor, "fact layer"]:
    """log p(base) - log p(base with one layer's states from `source`), mean over the target's tokens, in nats."""
    out = torch.zeros(len(encoded), base.model.atlas.n_layers)
    n_tokens = torch.tensor([e.n_target for e in encoded])
    for batch in batches(encoded, max_tokens):
        with (
            source.active() as model,
            torch.no_grad(),
            record(model.module, outputs=model.atlas.blocks) as seen,
        ):
            label_logits(model, batch)
        with base.active() as model, torch.no_grad():
            plain = label_nll(label_logits(model, batch), batch).cpu()
            for layer, block in enumerate(model.atlas.blocks):
                worse = _patched_nll(model, batch, block, seen.outputs[block]) - plain
                out[:, layer].index_add_(0, batch.example, worse)
    return out / n_tokens[:, None]


def _patched_nll(model: Model, batch: Batch, block: str, states: Tensor) -> Tensor:
    """NLL of each target token with the block's output replaced where targets are predicted."""

    def replace(hidden: Tensor) -> Tensor:
        rows, cols = batch.rows.to(hidden.device), batch.cols.to(hidden.device)
        hidden = hidden.clone()
        hidden[rows, cols] = states.to(hidden.device, hidden.dtype)[rows, cols]
        return hidden

    with patched(model.module, outputs={block: replace}):
        return label_nll(label_logits(model, batch), batch).cpu()
