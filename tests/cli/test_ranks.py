"""Commands on several processes: the artefacts of one, and an orderly end when one is lost."""

from __future__ import annotations

import contextlib
import json
import signal
import time

import pytest

from locus.cli import execute
from tests.cli.test_resume import FACTS
from tests.forked import job
from tests.tiny import save_tiny, tiny_model

TRACE = ["trace", "model", "facts.jsonl", "--limit", "3", "--kinds", "block", "-q"]
LONG = [*TRACE, "--samples", "40", "--engine", "plain", "--batch-tokens", "64"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, a fact file, and what one process makes of them; all modules are warm afterwards."""
    place = tmp_path_factory.mktemp("world")
    save_tiny(tiny_model("llama"), place / "model")
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    with contextlib.chdir(place):
        assert execute([*TRACE, "-o", "one"]) == 0
        assert execute([*LONG, "-o", "whole"]) == 0
    return place


def test_two_processes_write_what_one_writes(world):
    children = job(lambda: execute([*TRACE, "-o", "two"]), 2, world / "logs", world)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    names = sorted(path.name for path in (world / "one").iterdir())
    assert sorted(path.name for path in (world / "two").iterdir()) == names
    for name in names:
        if name not in ("trace.json", "report.html"):  # these tell how long it took
            assert (world / "two" / name).read_bytes() == (world / "one" / name).read_bytes(), name


def test_a_lost_process_ends_the_job_and_one_process_resumes_it(world):
    out = world / "broken"
    children = job(lambda: execute([*LONG, "-o", "broken"]), 2, world / "logs", world)
    deadline = time.monotonic() + 120
    while not list(out.rglob("*.safetensors")):
        assert time.monotonic() < deadline, [child.said for child in children]
        time.sleep(0.01)
    children[1].kill()
    assert children[1].wait() == -signal.SIGKILL
    children[0].kill(signal.SIGTERM)  # as torchrun does when one of its processes ends badly
    assert children[0].wait() == 1
    lines = children[0].said.splitlines()
    assert len(lines) == 1 and "another process of this job was lost" in lines[0] and "--resume" in lines[0]
    assert not (out / "trace.safetensors").exists()
    with contextlib.chdir(world):
        assert execute([*LONG, "-o", "broken", "--resume"]) == 0
    for name in ("trace.safetensors", "average.json"):
        assert (out / name).read_bytes() == (world / "whole" / name).read_bytes()


def test_an_error_of_all_is_said_once(world):
    children = job(
        lambda: execute(["trace", "model", "no.jsonl", "-o", "none", "-q"]), 2, world / "logs", world
    )
    codes = sorted(child.wait() for child in children)
    said = [line for child in children for line in child.said.splitlines()]
    assert codes == [1, 2] and len(said) == 1 and "no.jsonl: no such file" in said[0]


def test_a_command_that_shares_nothing_refuses_several_processes(world):
    children = job(lambda: execute(["export", "model", "--delta", "d", "-o", "x"]), 2, world / "logs", world)
    codes = sorted(child.wait() for child in children)
    said = [line for child in children for line in child.said.splitlines()]
    assert codes == [1, 2] and said == ["locus: locus export runs in one process: start it without torchrun"]
