"""What a loaded model's weights must be: finite numbers."""

from __future__ import annotations

import torch
from torch import nn

from locus.errors import InputError
from locus.parallel.sharding import to_local


def refuse_nonfinite(module: nn.Module, name: str) -> None:
    """Raise InputError for the first parameter that holds NaN or infinity; `name` is the model's."""
    for parameter, held in module.named_parameters():
        value = to_local(held)
        # A sum is finite only if every term is; it costs no copy. Only where it is not, look closer.
        if value.is_meta or torch.isfinite(value.sum(dtype=torch.float32)):
            continue
        if bad := int((~torch.isfinite(value)).sum()):
            raise InputError(
                f"{name}: {parameter} holds {bad} NaN or infinite values; the checkpoint is damaged"
            )
