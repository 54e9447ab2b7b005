"""Several processes of one job: every item once, nobody waits for the dead, one of them speaks."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from locus.errors import AlreadySaid, InputError, Stopped
from locus.parallel.ranks import ALONE, Ranks, joined
from tests.together.forked import job


def _many(size, patience=60.0):
    """The processes of a job as threads of this one, around one store."""
    store = dist.HashStore()
    return [Ranks(rank, size, store, patience) for rank in range(size)]


def _each(ranks, work):
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [job.result() for job in [pool.submit(work, one) for one in ranks]]


@pytest.mark.parametrize("size", [2, 4])
def test_every_item_falls_to_exactly_one_process(size):
    def work(ranks):
        first, second = list(ranks.share(range(50), "a")), list(ranks.share("xyz", "b"))
        ranks.barrier()
        return first, second

    taken = _each(_many(size), work)
    assert sorted(i for first, _ in taken for i in first) == list(range(50))
    assert sorted(c for _, second in taken for c in second) == ["x", "y", "z"]


def test_a_process_with_long_items_takes_fewer():
    busy = threading.Event()

    def work(ranks):
        taken = []
        for item in ranks.share(range(20), "facts"):
            taken.append(item)
            if ranks.rank == 0:
                busy.wait(30)  # its first item lasts until the other has done all the rest
        busy.set()
        return taken

    counts = sorted(len(taken) for taken in _each(_many(2), work))
    assert counts == [1, 19] or counts == [0, 20]


def test_processes_that_were_given_different_things_are_told():
    first, second = _many(2)
    first.agree("facts", "a b")
    second.agree("facts", "a b")
    first.agree("facts", "a b")
    with pytest.raises(InputError, match="process 1 of 2 has other facts"):
        second.agree("facts", "a c")
    ALONE.agree("facts", "anything")


def test_alone_it_takes_everything_in_order_and_waits_for_nobody(tmp_path):
    assert list(ALONE.share([3, 1, 2], "a")) == [3, 1, 2]
    ALONE.barrier()
    ALONE.leave()
    tensor = torch.ones(2)
    ALONE.all_reduce([tensor])
    assert tensor.tolist() == [1, 1]
    assert not ALONE.seen(tmp_path / "nothing")


def test_who_waits_for_a_silent_process_is_told_which():
    first, _ = _many(2, patience=1.5)
    started = time.monotonic()
    with pytest.raises(Stopped, match=r"process 1 of 2 has given no sign of life .* --resume"):
        first.barrier()
    assert time.monotonic() - started < 30


def test_a_process_that_gives_signs_of_life_is_waited_for():
    first, second = _many(2, patience=1.5)
    done = threading.Event()

    def beat():
        for _ in range(20):
            second._add("beat/1", 1)
            time.sleep(0.2)
        second.barrier()
        done.set()

    threading.Thread(target=beat).start()
    first.barrier()
    assert done.wait(10)


def test_only_the_first_error_is_said():
    first, second = _many(2)
    error = InputError("fact 'a': layer 3 gives NaN")
    assert first.tell(error) is error
    assert isinstance(second.tell(InputError("another")), AlreadySaid)
    with pytest.raises(AlreadySaid):
        second.barrier()


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is ALONE


def test_a_half_set_environment_is_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="start with torchrun"), joined():
        pass


def test_processes_add_tensors_over_gloo(tmp_path):
    def work():
        with joined() as ranks:
            tensor = torch.full((3,), float(ranks.rank + 1))
            ranks.all_reduce([tensor])
            print(tensor.tolist(), ranks.size, os.environ["RANK"], flush=True)
        return 0

    children = job(work, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    assert [child.said for child in children] == ["[3.0, 3.0, 3.0] 2 0\n", "[3.0, 3.0, 3.0] 2 1\n"]
