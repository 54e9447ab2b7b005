"""How fast the work went, against what the machine's matrix products could do at best."""

from __future__ import annotations

import resource
import sys
import time

import torch
import torch.nn.functional as F

from locus.model import Model


def flops_of(model: Model, tokens: float) -> float:
    """Floating-point operations of the blocks' matrix products for so many tokens: two a weight and token."""
    blocks = [model.module.get_submodule(name) for name in model.atlas.blocks]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1)
    return 2.0 * weights * tokens


def matrix_peak(model: Model) -> float:
    """Best rate of a matrix product of the MLP's shape here and now, in floating-point operations a second.

    Takes some hundredths of a second; the best of a few tries, so that other programs disturb it little.
    """
    cuda = model.device.type == "cuda"
    rows = 8192 if cuda else 400
    atlas = model.atlas
    x = torch.randn(rows, atlas.d_model, device=model.device).to(model.dtype)
    w = torch.randn(atlas.d_mlp, atlas.d_model, device=model.device).to(model.dtype)
    best = float("inf")
    for _ in range(6):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        F.linear(x, w)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * atlas.d_model * atlas.d_mlp / max(best, 1e-9)


def forget_peak(model: Model) -> None:
    """Begin to count the peak anew, where the device can."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)


def peak_bytes(model: Model) -> float:
    """Most memory in use: on the model's GPU since `forget_peak`, else resident in this process so far; the model
    itself is part of it."""
    if model.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(model.device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used if sys.platform == "darwin" else used * 1024)
