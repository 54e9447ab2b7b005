"""Tracing on two processes beside one, each process with one core and one thread.

    python -m benchmarks.many_processes FOLDER --facts demo-retain --limit 40

The whole command is timed, start of Python, loading and pictures included; processor seconds stand beside the
wall clock, for machines that others use as well. The traces must be equal byte for byte before a figure is
printed. What is there already in FOLDER is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SAME = ("trace.safetensors", "average.json", "lens.safetensors", "lens.json")


def measure(
    folder: Path, processes: int, cores: list[int], facts: str, limit: int, model: str
) -> dict[str, float]:
    """Trace in so many processes, each on a core of its own; wall clock and processor seconds."""
    kept = folder / f"{processes}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "locus", "trace", model, facts, "--limit", str(limit), "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [*command, "-o", str(folder / f"trace-{processes}")],
        check=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cores[:processes]),
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures = {"wall_s": wall, "cpu_s_a_process": cpu / processes}
    kept.write_text(json.dumps(figures))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--facts", default="demo-retain")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", type=int, choices=(1, 2), help="measure one of the two now")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    found = {
        n: measure(given.folder, n, cores, given.facts, given.limit, given.model)
        for n in ((given.only,) if given.only else (1, 2))
    }
    if len(found) < 2:
        return
    for name in SAME:
        one, two = (given.folder / f"trace-{n}" / name for n in (1, 2))
        assert one.read_bytes() == two.read_bytes(), f"{name} differs between one process and two"
    print("processes   wall clock   processor seconds a process")
    for n, figures in found.items():
        print(f"{n:9}   {figures['wall_s']:8.1f} s   {figures['cpu_s_a_process']:8.1f} s")
    wall, cpu = (found[2][key] / found[1][key] for key in ("wall_s", "cpu_s_a_process"))
    print(f"two / one   {wall:8.2f}     {cpu:8.2f}      (artefacts equal byte for byte)")


if __name__ == "__main__":
    main()
