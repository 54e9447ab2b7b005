"""Tracing on two processes beside one, each process with one core and one thread.

    python -m benchmarks.many_processes FOLDER --facts demo-retain --limit 40 [--together] [--options "--samples 4"]

The whole command is timed, start of Python, loading and pictures included; processor seconds stand beside the
wall clock. On a machine that others use too, --together starts both jobs at the same moment, unpinned, so that
both have the same neighbours. The traces must be equal byte for byte before a figure is printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAME = ("trace.safetensors", "average.json", "lens.safetensors", "lens.json")


@dataclass
class Job:
    """One way to run the command."""

    processes: int
    pid: int
    started: float
    wall: float = 0.0
    cpu: float = 0.0
    """Processor seconds of everything that was started, torchrun itself included."""


def start(processes: int, command: Sequence[str], folder: Path, pin: bool) -> Job:
    """Begin to trace in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    cores = sorted(os.sched_getaffinity(0))[: processes if pin else None]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "locus", *command, "-q", "-o", str(folder / f"trace-{processes}")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return Job(processes, process.pid, time.perf_counter())


def finish(jobs: Sequence[Job]) -> None:
    """Wait for the jobs, whichever comes first."""
    waiting = {job.pid: job for job in jobs}
    while waiting:
        pid, status, used = os.wait4(-1, 0)
        if pid in waiting:
            job = waiting.pop(pid)
            assert status == 0, f"{job.processes} processes: exit {os.waitstatus_to_exitcode(status)}"
            job.wall, job.cpu = time.perf_counter() - job.started, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--facts", default="demo-retain")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--together", action="store_true", help="both at once, where the machine is not quiet"
    )
    parser.add_argument("--options", default="", help="of the tracer, in one string")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    command = ["trace", given.model, given.facts, "--limit", str(given.limit), *shlex.split(given.options)]
    jobs = []
    for processes in (1, 2):
        jobs.append(start(processes, command, given.folder, pin=not given.together))
        if not given.together:
            finish(jobs[-1:])
    if given.together:
        finish(jobs)
    for name in SAME:
        one, two = (given.folder / f"trace-{n}" / name for n in (1, 2))
        assert one.read_bytes() == two.read_bytes(), f"{name} differs between one process and two"
    print("processes   wall clock   processor seconds a process")
    for job in jobs:
        print(f"{job.processes:9}   {job.wall:8.1f} s   {job.cpu / job.processes:8.1f} s")
    one, two = jobs
    ratios = f"{two.wall / one.wall:8.2f}     {two.cpu / two.processes / one.cpu:8.2f}"
    print(f"two / one   {ratios}      (artefacts equal byte for byte)")


if __name__ == "__main__":
    main()
