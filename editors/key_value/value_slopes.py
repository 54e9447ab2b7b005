"""How the log-probability of facts' targets depends on what neurons write, position by position.

The gradient of log p with respect to a layer's values W is G = Σ g kᵀ over positions: g the gradient at the output of
the down projection, k the neurons' activations there. Kept apart, g and k are a few rows for each fact; G would be a
matrix as large as W for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from editors.key_value.key_positions import KeyRow, batch_of, grouped
from locus.forward import label_logits, label_nll
from locus.hooks import patched, record
from locus.model import Model


@dataclass(frozen=True, eq=False)
class Slopes:
    """The gradients of some rows' log-probabilities, in factors."""

    keys: dict[int, Float[Tensor, "place neuron"]]
    """Activations by layer, float64, one row for each position of each sequence."""
    pulls: dict[int, Float[Tensor, "place d_model"]]
    """Gradients of log p(target), summed over its tokens, at the output of the down projections; float64."""
    owner: Int64[Tensor, " place"]
    """The fact that each place belongs to."""
    logprob: Float[Tensor, " row"]
    """log p(target) of each sequence, in nats."""

    def gradient(self, layer: int, fact: int) -> Float[Tensor, "d_model neuron"]:
        """G of one fact and layer, as the matrix it is."""
        mine = self.owner == fact
        found: Tensor = self.pulls[layer][mine].mT @ self.keys[layer][mine]
        return found


def value_slopes(
    model: Model,
    rows: Sequence[KeyRow],
    layers: Sequence[int],
    counted: Callable[[KeyRow], range],
    batch_tokens: int = 4096,
) -> Slopes:
    """One forward and one backward pass over the rows.

    Args:
        model: As it is in memory.
        rows: Sequences; `KeyRow.owner` is the fact of their places.
        layers: Whose values are asked about.
        counted: The positions of a row that count; the target itself is never among a fact's prompt.
        batch_tokens: Padded tokens in one forward.
    """
    sites = {layer: model.atlas.neuron_in[layer] for layer in layers}
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    pulls: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    owners: list[int] = []
    logprob = torch.zeros(len(rows), dtype=torch.float64)
    for group in grouped(rows, batch_tokens):
        batch = batch_of(rows, group)
        held: dict[str, Tensor] = {}

        def watch(name: str, held: dict[str, Tensor] = held) -> Callable[[Tensor], Tensor]:
            def add(output: Tensor) -> Tensor:
                held[name] = torch.zeros_like(output, requires_grad=True)
                return output + held[name]

            return add

        with (
            torch.enable_grad(),
            record(model.module, inputs=sites.values()) as seen,
            patched(model.module, outputs={site: watch(site) for site in sites.values()}),
        ):
            nll = label_nll(label_logits(model, batch), batch)
            found = torch.autograd.grad(-nll.sum(), [held[site] for site in sites.values()])
        logprob.index_add_(0, batch.example, -nll.detach().double().cpu())
        places = [(line, at) for line, i in enumerate(group) for at in counted(rows[i])]
        where = tuple(torch.tensor(axis) for axis in zip(*places, strict=True))
        owners += [rows[group[line]].owner for line, _ in places]
        for (layer, site), pull in zip(sites.items(), found, strict=True):
            keys[layer].append(seen.inputs[site][where].double().cpu())
            pulls[layer].append(pull[where].double().cpu())
    return Slopes(
        {layer: torch.cat(pieces) for layer, pieces in keys.items()},
        {layer: torch.cat(pieces) for layer, pieces in pulls.items()},
        torch.tensor(owners),
        logprob,
    )
