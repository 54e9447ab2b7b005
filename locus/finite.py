"""NaN and infinity: whether there are any, and in which parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from locus.errors import InputError
from locus.sharded import local


def is_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(one).all()) for one in tensors if one.is_floating_point())


def refuse_nonfinite(module: nn.Module, name: str) -> None:
    """Raise InputError for the first parameter that holds NaN or infinity; `name` is the model's."""
    for parameter, held in module.named_parameters():
        value = local(held)
        # A sum is finite only if every term is; it costs no copy. Only where it is not, look closer.
        if value.is_meta or torch.isfinite(value.sum(dtype=torch.float32)):
            continue
        if bad := int((~torch.isfinite(value)).sum()):
            raise InputError(
                f"{name}: {parameter} holds {bad} NaN or infinite values; the checkpoint is damaged"
            )
