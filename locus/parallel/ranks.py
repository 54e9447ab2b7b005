"""The processes of one job: who they are, who does what, and what happens when one of them is lost.

`torchrun --nproc-per-node N -m locus trace …` starts the same command N times. Work that falls into
independent pieces is handed out one piece at a time from a counter in the job's store, so that a process with
easy pieces takes more of them; what is finished lies in the output folder, which all of them must see.

Each process gives a sign of life through the store every few seconds. Whoever waits for the others looks for
it, and ends with one clear line when one of them has gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from locus.errors import AlreadySaid, InputError, Stopped
from locus.progress import task, track

T = TypeVar("T")

_GO_ON = "what is finished is kept, and the same command with --resume goes on from there"
_BEAT = 2.0
"""Seconds between two signs of life."""


class Ranks:
    """The processes of one job, as one of them sees them. Without a job: this process alone.

    Methods that all processes must call, in the same order, say so.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        told_to_end: Whether torchrun has ended this job, because of another process.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Store | None = None, patience: float = 60.0
    ) -> None:
        """With more than one process, `store` is theirs; one silent for `patience` seconds is lost."""
        self.rank, self.size = rank, size
        self._store, self._patience = store, patience
        self._calls = 0
        self.told_to_end = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all have made."""
        return self.rank == 0

    def share(self, items: Sequence[T], description: str) -> Iterator[T]:
        """Yield the items that fall to this process, one at a time; all processes call it with the same items.

        Whoever is ready takes the next. Each item goes to exactly one process.
        """
        if self._store is None:
            yield from track(items, description)
            return
        key, shown = self._key("share"), 0
        with task(description, len(items)) as line:
            while (taken := self._add(key, 1) - 1) < len(items):
                yield items[taken]
                line.advance(taken + 1 - shown)
                shown = taken + 1
            line.advance(len(items) - shown)

    def agree(self, what: str, value: str) -> None:
        """Make sure that all processes were given the same; all of them call it.

        Raises:
            InputError: this process has another `value` than the one that came first.
        """
        if self._store is None:
            return
        with _lost_when_it_fails():
            first = self._store.compare_set(self._key("agree"), "", value)
        if first != value.encode():
            raise InputError(
                f"process {self.rank} of {self.size} has other {what} than the others: give all of them the same "
                "files, model, options and threads"
            )

    def broadcast_object(self, value: str) -> str:
        """What the first process says, on all of them; all of them call it."""
        return self.all_gather(value)[0]

    def all_gather(self, value: str) -> list[str]:
        """What each process says, in the order of the processes, on all of them; all of them call it."""
        if self._store is None:
            return [value]
        key = self._key("all_gather")
        with _lost_when_it_fails():
            self._store.set(f"{key}/{self.rank}", value)
        self.barrier()
        with _lost_when_it_fails():
            return [self._store.get(f"{key}/{rank}").decode() for rank in range(self.size)]

    def barrier(self) -> None:
        """Wait until all processes are here; all of them call it.

        Raises:
            Stopped: one of them is lost.
            AlreadySaid: one of them ended with an error, and said which.
        """
        if self._store is None:
            return
        key = self._key("barrier")
        self._add(key, 1)
        watch = _Watch(self)
        while self._add(key, 0) < self.size:
            watch.look()
            time.sleep(0.05)

    @contextlib.contextmanager
    def hold(self, folder: Path) -> Iterator[None]:
        """Keep an output folder to this job, as `locus.files.artefact.lock` does; all processes call it."""
        from locus.files.artefact import lock

        with lock(folder) if self.first else contextlib.nullcontext():
            self.barrier()
            yield

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes; all of them call it.

        Sums of floats depend on the order of their terms: equal to one process's within rounding.
        """
        if self._store is None:
            return
        for tensor in tensors:
            if not tensor.numel():
                continue
            with _lost_when_it_fails():
                dist.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor, rank: int) -> None:
        """Give all processes what `rank` has in its tensor, a contiguous one on the CPU; all of them call it."""
        if self._store is None or not tensor.numel():
            return
        with _lost_when_it_fails():
            dist.broadcast(tensor.view(-1).view(torch.uint8), rank)

    def seen(self, path: Path) -> bool:
        """Whether a file that another process has written is there; waits for a file system that lags."""
        deadline = time.monotonic() + (self._patience if self.size > 1 else 0)
        while not path.exists():
            if time.monotonic() >= deadline:
                return False
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # makes a network file system look again
            time.sleep(0.2)
        return True

    def beats(self, rank: int) -> int:
        """Signs of life that a process has given."""
        return self._add(f"beat/{rank}", 0)

    def failed(self) -> bool:
        """Whether a process has ended with an error that it has told the user."""
        return self._add("failed", 0) > 0

    def tell(self, error: BaseException) -> BaseException:
        """What this process should end with: the error, or `AlreadySaid` where another has spoken first."""
        if self._store is None or isinstance(error, AlreadySaid):
            return error
        with contextlib.suppress(Stopped):
            if self._add("failed", 1) > 1:
                return AlreadySaid()
        return error

    def leave(self) -> None:
        """The last barrier; all processes call it."""
        self.barrier()
        self.shutdown_grace(self._patience)

    def shutdown_grace(self, seconds: float) -> None:
        """Leave; the process that keeps the store waits a while until the others have left as well."""
        if self._store is None or self._add("left", 1) == self.size or not self.first:
            return
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return  # torchrun keeps it
        deadline = time.monotonic() + seconds
        while self._add("left", 0) < self.size and time.monotonic() < deadline:
            time.sleep(0.05)

    def _key(self, what: str) -> str:
        self._calls += 1
        return f"{what}/{self._calls}"

    def _add(self, key: str, n: int) -> int:
        if self._store is None:
            return n
        if self.told_to_end and threading.current_thread() is threading.main_thread():
            raise _Ended
        with _lost_when_it_fails():
            return int(self._store.add(key, n))


ALONE = Ranks()
"""One process."""


class _Ended(BaseException):
    """torchrun ends this process. Like a KeyboardInterrupt nothing on the way takes it for an error of its own."""


class _Watch:
    """Looks for signs of life of the others, once a second."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.next = ranks, 0.0
        self.heard = {rank: (-1, time.monotonic()) for rank in range(ranks.size) if rank != ranks.rank}

    def look(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + 1.0
        if self.ranks.failed():
            raise AlreadySaid
        for rank, (beats, since) in self.heard.items():
            if (found := self.ranks.beats(rank)) != beats:
                self.heard[rank] = (found, now)
            elif now - since > self.ranks._patience:
                raise Stopped(
                    f"process {rank} of {self.ranks.size} has given no sign of life for {now - since:.0f} s and "
                    f"is taken for lost; {_GO_ON}"
                )


def asked_for() -> bool:
    """Whether this process was started as one of several (torchrun sets WORLD_SIZE)."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started with it; alone where there was no torchrun.

    On a machine with GPUs each process takes its own as "cuda". Sums travel by NCCL there, else by gloo.
    When the block raises, one process says why and the others end in silence.

    Raises:
        InputError: the environment is not torchrun's, or there are fewer GPUs than processes.
        Stopped: another process was lost.
    """
    if not asked_for():
        yield ALONE
        return
    ranks = _join()
    quiet = threading.Event()
    beating = threading.Thread(target=_beat, args=(ranks, quiet), daemon=True)
    beating.start()
    try:
        with _ended_by_torchrun(ranks):
            yield ranks
            ranks.leave()
    except (Exception, KeyboardInterrupt, _Ended) as error:
        ranks.told_to_end = False
        why = f"another process of this job was lost (killed, or out of memory?); {_GO_ON}"
        said = ranks.tell(Stopped(why) if isinstance(error, _Ended) or _cut_off(error) else error)
        with contextlib.suppress(Stopped):
            ranks.shutdown_grace(5.0)
        raise said from (error.__cause__ if said is error else None)
    finally:
        quiet.set()
        beating.join()
        dist.destroy_process_group()


def _cut_off(error: BaseException) -> bool:
    """Whether the other end of a sum is gone: gloo and NCCL say so in the middle of a forward or a backward."""
    words = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo/transport" in words or "NCCL" in words
    )


def _join() -> Ranks:
    backend = None
    if torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise InputError(f"process {local} of this machine has no GPU ({there} there are): start fewer")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        dist.init_process_group(
            backend or "gloo", store=PrefixStore("sums", store), rank=rank, world_size=size
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"WORLD_SIZE is set but no job can be joined ({reason}): start with torchrun"
        ) from error
    return Ranks(rank, size, PrefixStore("locus", store))


def _beat(ranks: Ranks, quiet: threading.Event) -> None:
    with contextlib.suppress(Stopped):
        while not quiet.wait(_BEAT):
            ranks._add(f"beat/{ranks.rank}", 1)


@contextlib.contextmanager
def _ended_by_torchrun(ranks: Ranks) -> Iterator[None]:
    """Let the SIGTERM by which torchrun ends the survivors unwind the work.

    An exception that a signal raises may be lost (inside a finalizer, say): the flag stays, and is looked at
    whenever this process turns to the others.
    """

    def end(*_: object) -> None:
        ranks.told_to_end = True
        raise _Ended

    before: Callable[..., object] | int | None = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _lost_when_it_fails() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, Stopped):
            raise
        reason = str(error).splitlines()[0]
        raise Stopped(
            f"the other processes of this job cannot be reached any more ({reason}); {_GO_ON}"
        ) from error
