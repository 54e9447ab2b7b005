"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(one).all()) for one in tensors if one.is_floating_point())
