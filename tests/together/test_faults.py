"""What goes wrong around a command: two at once, Ctrl-C, no room, no network."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import time

import pytest

from locus.cli import execute
from tests.tiny import save_tiny, tiny_model
from tests.together.forked import fork
from tests.together.kills import COMMANDS, FACTS

LONG = ["trace", "model", "facts.jsonl", "--samples", "40", "--kinds", "block", "--engine", "plain"]
LONG += ["--batch-tokens", "64", "-q", "-o", "out"]


@pytest.fixture
def world(tmp_path):
    save_tiny(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    import tracing.causal  # so that a forked child finds it in memory  # noqa: F401

    return tmp_path


def _begun(world):
    """A long trace in a process of its own, once it has finished a fact."""
    child = fork(lambda: execute(LONG), world / "first.log", world)
    deadline = time.monotonic() + 200
    while not list((world / "out").rglob("*.safetensors")):
        assert time.monotonic() < deadline and "locus: " not in child.said, child.said
        time.sleep(0.01)
    return child


def test_two_runs_into_one_folder_and_ctrl_c(world):
    first = _begun(world)
    second = fork(lambda: execute([*LONG, "--resume"]), world / "second.log", world)
    assert second.wait() == 2
    assert second.said.splitlines() == [
        "locus: out: another run is writing there; wait or name another folder"
    ]
    first.kill(signal.SIGINT)
    assert first.wait() == 1
    assert first.said.splitlines()[-1].startswith("locus: stopped; what is finished is kept")
    assert "Traceback" not in first.said
    assert not (world / "out" / "trace.safetensors").exists()
    assert not [path for path in world.rglob("*") if "locus-tmp" in path.name]
    with contextlib.chdir(world):
        assert execute([*LONG, "--resume"]) == 0


def test_a_disk_without_room_is_one_line_and_leaves_nothing_half_written(world):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        return execute([*COMMANDS["trace"], "-o", "full"])

    child = fork(work, world / "full.log", world)
    assert child.wait() == 2
    said = [line for line in child.said.splitlines() if not line.startswith("locus: note")]
    assert len(said) == 1 and "cannot be written" in said[0]
    assert not (world / "full" / "trace.safetensors").exists()
    assert not [path for path in world.rglob("*") if "locus-tmp" in path.name]


def test_nothing_speaks_to_the_network(world, monkeypatch):
    """Every socket refuses; the whole walk goes through."""

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    walk = [
        [*COMMANDS["trace"], "-o", "trace"],
        ["locate", "model", "facts.jsonl", "-o", "mask.safetensors", "--budget", "20%", "-q"],
        [*COMMANDS["edit"], "-o", "edit"],
        ["export", "model", "--delta", "edit/delta.safetensors", "-o", "new", "-q"],
        ["diff", "model", "new", "--mask", "mask.safetensors", "-q"],
        ["revert", "new", "--delta", "edit/delta.safetensors", "-o", "back", "-q"],
    ]
    with contextlib.chdir(world):
        for argv in walk:
            assert execute(argv) == 0, argv


def test_offline_a_hub_name_is_refused_without_a_connection(tmp_path):
    from huggingface_hub import constants

    def work():
        constants.HF_HUB_OFFLINE = True

        def refuse(*_, **__):
            os._exit(77)

        socket.socket.connect = refuse
        return execute(["known", "nobody/nothing", "demo-forget", "-q"])

    child = fork(work, tmp_path / "log", tmp_path, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert child.wait() == 2, child.said
    assert "nobody/nothing: no such folder here, and the hub did not give it" in child.said
