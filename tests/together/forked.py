"""Processes forked from a warm one: a command in a process of its own without the price of starting Python.

The parent has torch and transformers in memory; a child runs one callable and leaves with its exit code, by
`os._exit`, so that nothing of pytest is run twice.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Child:
    """A forked process, and where its stdout and stderr go."""

    pid: int
    log: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120.0) -> int:
        """Exit code; minus the signal's number where a signal ended it. Killed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                self.kill()
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"nothing after {timeout} s: {self.said[-500:]}")
            time.sleep(0.002)

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")


def fork(
    work: Callable[[], int], log: Path, folder: Path | None = None, env: Mapping[str, str] | None = None
) -> Child:
    """Run `work` in a child, in `folder` and with `env` added to its environment."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    pid = os.fork()
    if pid:
        os.close(out)
        return Child(pid, log)
    code = 99
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        torch.set_num_threads(1)
        os.environ.update(env or {})
        if folder is not None:
            os.chdir(folder)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def job(work: Callable[[], int], size: int, logs: Path, folder: Path | None = None) -> list[Child]:
    """Fork `size` processes that see what torchrun's would see."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        fork(work, logs / f"rank{r}.log", folder, {**where, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(size)
    ]
