"""Rounding of trained float32 values to the checkpoint's dtype, which can lose small updates.

- `nearest`: an update smaller than half the spacing of the numbers around its weight is lost. `WeightDelta.rounding`
  says how much was lost.
- `stochastic`: rounded up or down at random, so that such updates survive on average.
- `compensated`: the forward uses the rounded weights, and the float32 delta keeps the rounding error for later steps
  (error feedback; Seide et al. 2014, "1-bit SGD"). The edit is trained on the weights that will be saved.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from locus.checkpoint import Checkpoint
from locus.mask import WeightMask
from locus.model import Model


def saved_dtypes(model: Model, mask: WeightMask) -> dict[str, torch.dtype]:
    """Located parameter -> dtype of its tensor in the checkpoint (in memory, where there is no folder)."""
    if model.folder is None:
        held = dict(model.module.named_parameters(remove_duplicate=False))
        return {name: held[name].dtype for name in mask.entries}
    checkpoint = Checkpoint(model.folder)
    return {name: checkpoint.dtypes[checkpoint.resolve(name)] for name in mask.entries}


def as_saved(
    old: Float[Tensor, "*shape"], delta: Float[Tensor, "*shape"], dtype: torch.dtype
) -> Float[Tensor, "*shape"]:
    """old + delta rounded to `dtype`, in the dtype of `delta`; its gradient is that of old + delta."""
    rounded = (old.to(delta.dtype) + delta.detach()).to(dtype).to(delta.dtype)
    return rounded + (delta - delta.detach())


def stochastically_rounded(
    exact: Float[Tensor, "..."], dtype: torch.dtype, source: torch.Generator
) -> Float[Tensor, "..."]:
    """Values that `dtype` can hold, rounded up or down at random so that their expectation is the exact value.

    An update smaller than half the spacing of the numbers around its weight, which rounding to the nearest
    would lose altogether, survives on average (Gupta et al. 2015, arXiv:1502.02551).

    Returns:
        The rounded values, still in the dtype of `exact`.
    """
    nearest = exact.to(dtype)
    error = exact - nearest.to(exact.dtype)
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).to(dtype))
    gap = (other.to(exact.dtype) - nearest.to(exact.dtype)).abs()
    drawn = torch.rand(exact.shape, generator=source).to(exact)
    return torch.where(drawn * gap < error.abs(), other, nearest).to(exact.dtype)
