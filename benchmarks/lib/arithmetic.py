"""What time is made of: a clock, the matrix products that a grid cannot do without, peak memory, the machine.

The necessary arithmetic is what a grid of block outputs cannot do without: matrix products of the rows that a patch
changes, the keys and values of the last block, and one unembedding a cell and draw, timed as bare products of the
same shapes, 400 rows at a time (attention, norms, activations and the softmax are not counted).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.traced_prompt import Setup
from locus.model import Model

CHUNK_ROWS = 400


class Clock:
    """Seconds of work: the processor's own count with one thread (other programs do not disturb it), else wall time."""

    def __init__(self, model: Model) -> None:
        self.cuda = model.device.type == "cuda"
        self.name = "wall" if self.cuda or torch.get_num_threads() > 1 else "cpu"

    def __call__(self, work: Callable[[], object]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter if self.name == "wall" else time.process_time
        started = now()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return now() - started


def necessary_flops(model: Model, it: Setup) -> dict[tuple[int, int], float]:
    """(in, out) of each weight shape -> rows that must go through it for a grid of block outputs.

    For a patch at (l, t): rows t to the end (one fewer where the first corrupted token is restored) through blocks
    l + 1 to the last but one; of the last block all rows' keys and values, and the rest for the last row alone.
    """
    atlas, samples = model.atlas, it.question.samples
    rows, last_rows, last_only = 0, 0, 0
    for position in range(it.start, it.n_pos):
        n = it.n_pos - position - (position == it.start)
        if n == 0:
            continue
        entered = atlas.n_layers - 1  # layers l = 0 … L - 2 go through the last block
        rows += n * (atlas.n_layers - 2) * (atlas.n_layers - 1) // 2
        last_rows += n * entered
        last_only += entered
    n_read = last_only + 1
    shapes: dict[tuple[int, int], float] = {}

    def add(width_in: int, width_out: int, count: float) -> None:
        shapes[width_in, width_out] = shapes.get((width_in, width_out), 0.0) + count * samples

    d, kv, z = atlas.d_model, atlas.n_kv_heads * atlas.d_head, atlas.n_heads * atlas.d_head
    gates = sum(part.role in ("gate", "up") for part in atlas.neurons[0])
    for count, keys in ((rows + it.n_pos * atlas.n_layers / samples, None), (last_only, last_rows)):
        add(d, z, count)
        add(d, kv, 2 * (keys if keys is not None else count))
        add(z, d, count)
        add(d, atlas.d_mlp, gates * count)
        add(atlas.d_mlp, d, count)
    add(d, atlas.d_vocab, n_read)
    return shapes


def _repeated(x: Tensor, w: Tensor, times: int) -> None:
    for _ in range(times):
        F.linear(x, w)


def floor_seconds(model: Model, shapes: dict[tuple[int, int], float], clock: Clock) -> tuple[float, float]:
    """Seconds of the bare products, and the best rate of any of the shapes in FLOP/s."""
    total, best = 0.0, 0.0
    for (width_in, width_out), rows in shapes.items():
        n_rows = CHUNK_ROWS if model.device.type == "cpu" else 4096
        x = torch.randn(n_rows, width_in, dtype=model.dtype, device=model.device)
        w = torch.randn(width_out, width_in, dtype=model.dtype, device=model.device)
        times = max(1, int((2e9 if model.device.type == "cpu" else 2e12) / (n_rows * width_in * width_out)))
        F.linear(x, w)
        seconds = clock(partial(_repeated, x, w, times)) / times
        total += rows / n_rows * seconds
        best = max(best, 2 * n_rows * width_in * width_out / seconds)
    return total, best


def peak_megabytes(work: Callable[[], object]) -> float | None:
    """Most resident memory during the work above what there was before it; None where Linux does not count it."""

    def high_water() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else the work is done in memory that earlier work has given back
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
    except (OSError, StopIteration):
        return None
    work()
    return high_water() - before


def machine() -> dict[str, Any]:
    """Where and when."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": load,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
