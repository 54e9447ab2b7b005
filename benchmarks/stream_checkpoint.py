"""Export, revert and diff of a checkpoint larger than memory, against a plain copy on the same disk.

    python -m benchmarks.stream_checkpoint FOLDER --gigabytes 8 --limit 1.5

Writes a synthetic sharded bfloat16 checkpoint into FOLDER, a delta that changes 1 % of the rows of every MLP
tensor, and works under a limit on the address space beyond what Python and torch take at start (nothing is
mapped, so every byte of ours counts). Copying and exporting both end with everything on the disk (fsync). The
answers are asserted before a figure is printed: off-mask bits, the exact count of changed entries, and the
reverted folder's fingerprint.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from locus.checkpoint_export import Checkpoint, diff, export, revert
from locus.delta import WeightDelta
from locus.files.artefact import atomic_file
from locus.files.tensorfile import write_tensors
from locus.mask import WeightMask
from locus.selection import Selection

ROWS, COLUMNS = 14336, 4096
"""Of an MLP tensor of an 8B model: 117 MB in bfloat16."""


def make(folder: Path, n_bytes: int) -> None:
    """The base, its mask and its delta."""
    generator = torch.Generator().manual_seed(0)
    size = ROWS * COLUMNS * 2
    n_layers = max(1, n_bytes // (size * 4))
    weight_map: dict[str, str] = {}
    entries, mask = {}, {}
    base = folder / "base"
    base.mkdir(parents=True)
    noise = torch.randn(ROWS, COLUMNS, generator=generator).mul_(0.02).bfloat16()
    for layer in range(n_layers):
        # Three MLP tensors, and as many bytes of attention as one of them.
        shard = f"model-{layer + 1:05d}-of-{n_layers:05d}.safetensors"
        tensors = {
            f"model.layers.{layer}.{part}.weight": noise.roll(layer * 7 + i, 0)
            for i, part in enumerate(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.qkv_proj"))
        }
        with atomic_file(base / shard) as temp:
            write_tensors(temp, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        for name in list(tensors)[:3]:
            rows = torch.randperm(ROWS, generator=generator)[: ROWS // 100]
            selection = Selection("rows", rows, (ROWS, COLUMNS))
            entries[name] = (selection, -selection.take(tensors[name]))
            mask[name] = selection
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text("{}")
    chosen = WeightMask(mask)
    chosen.save(folder / "mask.safetensors")
    WeightDelta.of_entries(Checkpoint(base), entries, chosen).save(folder / "delta.safetensors")


def plain_copy(source: Path, target: Path) -> None:
    """What the disk can do: every file copied by the standard library and flushed."""
    shutil.copytree(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, with every earlier write out of the way, and the result."""
    os.sync()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(folder: Path, limit: int) -> dict[str, Any]:
    """The figures, all made under the limit."""
    at_start = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (at_start + limit, at_start + limit))
    base = Checkpoint(folder / "base")
    delta, mask = WeightDelta.load(folder / "delta.safetensors"), WeightMask.load(folder / "mask.safetensors")
    seconds = {}
    seconds["copy"], _ = timed(lambda: plain_copy(folder / "base", folder / "copy"))
    shutil.rmtree(folder / "copy")
    seconds["export"], _ = timed(lambda: export(base, delta, folder / "out"))
    seconds["diff"], report = timed(lambda: diff(base, folder / "out", mask))
    assert report.n_off_mask == 0 and report.n_changed == delta.n_changed > 0, report.summary
    seconds["revert"], _ = timed(lambda: revert(folder / "out", delta, folder / "back"))
    shutil.rmtree(folder / "out")
    seconds["copy again"], _ = timed(lambda: plain_copy(folder / "base", folder / "copy"))
    shutil.rmtree(folder / "copy")
    seconds["fingerprint"], fingerprint = timed(base.fingerprint)
    assert Checkpoint(folder / "back").fingerprint() == fingerprint
    shutil.rmtree(folder / "back")
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return {"n_bytes": base.n_bytes, "seconds": seconds, "peak_rss": peak, "limit": limit, "start": at_start}


def main() -> None:
    """Make, measure in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--limit", type=float, default=1.5, help="GB of address space beyond the start")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, int(args.limit * 1e9))))
        return
    make(args.folder, int(args.gigabytes * 1e9))
    command = [sys.executable, "-m", "benchmarks.stream_checkpoint", str(args.folder), "--measure"]
    done = subprocess.run(
        [*command, "--limit", str(args.limit)], check=True, stdout=subprocess.PIPE, text=True
    )
    shutil.rmtree(args.folder)
    figures = json.loads(done.stdout.splitlines()[-1])
    copy = (figures["seconds"]["copy"] + figures["seconds"]["copy again"]) / 2
    print(f"{figures['n_bytes'] / 1e9:.1f} GB, peak {figures['peak_rss'] / 1e9:.2f} GB resident")
    for name, seconds in figures["seconds"].items():
        rate = figures["n_bytes"] / seconds / 1e9
        print(f"{name:12} {seconds:7.1f} s  {rate:5.2f} GB/s  {copy / seconds:5.2f} of the copy's speed")


if __name__ == "__main__":
    main()
