"""A change of the residual stream, written into several layers' down projections.

MEMIT, AlphaEdit and LaW differ in how they solve for one layer's update and share the rest: the state z of the
subject's last token after the highest edited block is found once, then each edited layer, lowest first, takes its
part of what is still missing (Meng et al. 2023, arXiv:2210.07229, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from editors.key_value.down_projections import DownProjection, add_
from editors.key_value.edit_target import EditTarget
from editors.key_value.key_positions import KeyRow, Place, mean_by_owner, row, states, with_prefix
from editors.key_value.target_value import ValueDeltas, find_value_deltas, plain_rows
from locus.fact import Fact
from locus.model import Model

SolveResiduals = Callable[
    [DownProjection, Float[Tensor, "n key"], Float[Tensor, "d_model key"]], Float[Tensor, "d_model n"]
]
"""Located projection, keys of its located neurons, residuals -> update of these neurons' columns."""
_NEWTON_STEPS = 4


@dataclass(frozen=True, eq=False)
class ResidualSpread:
    """The facts of one batch, the state wanted for each, and the layers to write it into."""

    model: Model
    located: Sequence[DownProjection]
    """Lowest layer first."""
    groups: Sequence[Sequence[Fact]]
    """Facts that share a key; one state is wanted for each group."""
    plain: Sequence[KeyRow]
    """Each fact's prompt; the owner is the index of its group."""
    seen: Sequence[KeyRow]
    """The same, and after every context prefix."""
    wanted: Float[Tensor, "key d_model"]
    """The output of the highest block that the edit is to bring about."""
    found: ValueDeltas
    batch_tokens: int

    @classmethod
    def find(
        cls,
        model: Model,
        groups: Sequence[Sequence[Fact]],
        located: Sequence[DownProjection],
        target: EditTarget,
        prefixes: Sequence[str],
        place: Place,
        batch_tokens: int,
    ) -> ResidualSpread:
        """Search for the states wanted; the model is looked at as it is now."""
        top = model.atlas.blocks[located[-1].layer]
        found = find_value_deltas(model, groups, target, top, prefixes, place, batch_tokens)
        return cls(
            model,
            located,
            groups,
            plain_rows(model, groups, place),
            [
                row(model, with_prefix(fact, prefix), key, place)
                for key, group in enumerate(groups)
                for fact in group
                for prefix in ("", *prefixes)
            ],
            found.start + found.delta,
            found,
            batch_tokens,
        )

    def keys(self, projection: DownProjection) -> Float[Tensor, "n key"]:
        """What the projection's located neurons say of each key's facts now, mean over the context prefixes."""
        site = self.model.atlas.neuron_in[projection.layer]
        read, _ = states(self.model, self.seen, inputs=[site], batch_tokens=self.batch_tokens)
        return mean_by_owner(read[site], self.seen, len(self.groups))[:, projection.neurons].mT

    def missing(self) -> Float[Tensor, "key d_model"]:
        """The part of the wanted state that is not there yet."""
        top = self.model.atlas.blocks[self.located[-1].layer]
        _, now = states(self.model, self.plain, outputs=[top], batch_tokens=self.batch_tokens)
        return self.wanted - mean_by_owner(now[top], self.plain, len(self.groups))

    def write_(self, solve: SolveResiduals, keep: Callable[[DownProjection, Tensor, Tensor], None]) -> None:
        """Write the updates into the model in memory, layer by layer.

        Args:
            solve: One layer's update.
            keep: Called with every layer's keys and update of the whole matrix.
        """
        for i, projection in enumerate(self.located):
            residual = self.missing() / (len(self.located) - i)
            residual = before_norm(self.model, projection.layer, self.plain, residual, self.batch_tokens)
            keys = self.keys(projection)
            update = projection.spread(solve(projection, keys, residual.mT))
            add_(self.model, projection, update)
            keep(projection, keys, update)


def before_norm(
    model: Model,
    layer: int,
    plain: Sequence[KeyRow],
    residual: Float[Tensor, "key d_model"],
    batch_tokens: int = 4096,
) -> Float[Tensor, "key d_model"]:
    """The change of the down projection's output that changes what the MLP adds to the stream by `residual`.

    They are the same unless a norm stands between them (Gemma-2, Gemma-3, OLMo-2). Then the nearest output that the
    norm can give is aimed at, by a few Gauss-Newton steps.
    """
    site, added = model.atlas.neuron_in[layer], model.atlas.mlp_out[layer]
    if site == added or site.startswith(added + "."):
        return residual
    norm = model.module.get_submodule(added)
    _, now = states(model, plain, outputs=[site], batch_tokens=batch_tokens)
    dtype = torch.promote_types(model.dtype, torch.float32)

    def through(value: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        normed: Tensor = norm(value.to(model.dtype)).to(dtype)
        return normed

    deltas = []
    starts = mean_by_owner(now[site], plain, len(residual))
    for start, change in zip(starts.to(dtype), residual.to(dtype), strict=True):
        start, change = start.to(model.device), change.to(model.device)
        value, wanted = start, through(start) + change
        for _ in range(_NEWTON_STEPS):
            slope = torch.autograd.functional.jacobian(through, value)
            square = slope.mT @ slope
            square += 1e-4 * square.diagonal().mean() * torch.eye(len(square)).to(square)
            value = value + torch.linalg.solve(square, slope.mT @ (wanted - through(value)))
        deltas.append((value - start).double().cpu())
    return torch.stack(deltas)
