"""kill -9 in the middle, then the same command with --resume: the artefacts of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from locus.cli import execute
from tests.tiny import save_tiny, tiny_model

FACTS = [
    {
        "id": f"f{i}",
        "prompt": f"The {word} Tower is in the city of",
        "target": " Paris",
        "subject": f"{word} Tower",
    }
    for i, word in enumerate(("Eiffel", "Gothic", "Marble", "Silver", "Wooden", "Copper"))
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model folder, a fact file and a mask."""
    place = tmp_path_factory.mktemp("world")
    save_tiny(tiny_model("llama"), place / "model")
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    locate = ["locate", "model", "facts.jsonl", "-o", "mask.safetensors", "--budget", "20%", "-q"]
    assert _in(place, locate) == 0
    return place


def _in(place: Path, argv: list[str]) -> int:
    before = Path.cwd()
    os.chdir(place)
    try:
        return execute(argv)
    finally:
        os.chdir(before)


def _killed(place: Path, argv: list[str], ready: Callable[[], bool]) -> None:
    """Run the command in a process of its own, and kill it as soon as `ready` holds."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "locus", *argv], cwd=place, env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while not ready():
        if process.poll() is not None:
            said = process.stderr.read().decode() if process.stderr else ""
            pytest.fail(f"the command ended before it could be killed: {said}")
        assert time.monotonic() < deadline, "nothing to kill after four minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_trace(world):
    command = [
        "trace",
        "model",
        "facts.jsonl",
        "--samples",
        "5",
        "--engine",
        "plain",
        "--batch-tokens",
        "64",
        "-q",
    ]
    assert _in(world, [*command, "-o", "whole"]) == 0
    out = world / "broken"
    _killed(world, [*command, "-o", "broken"], lambda: len(list(out.rglob("*.safetensors"))) >= 2)
    assert not (out / "trace.safetensors").exists()
    assert _in(world, [*command, "-o", "broken", "--resume"]) == 0
    for name in ("trace.safetensors", "average.json"):
        assert (out / name).read_bytes() == (world / "whole" / name).read_bytes()


def test_edit(world):
    command = ["edit", "model", "facts.jsonl", "--mask", "mask.safetensors", "--method", "ga", "-q"]
    command += ["--steps", "40", "--min-steps", "40", "--save-every", "1", "--utility", "0", "--floor", "0"]
    command += ["--goal", "0", "--lr", "1e-4"]
    assert _in(world, [*command, "-o", "whole-edit"]) == 0
    out = world / "broken-edit"
    _killed(world, [*command, "-o", "broken-edit"], lambda: bool(list(out.rglob("*.safetensors"))))
    assert not (out / "delta.safetensors").exists()
    assert _in(world, [*command, "-o", "broken-edit", "--resume"]) == 0
    for name in ("delta.safetensors", "edit.json", "history.jsonl"):
        assert (out / name).read_bytes() == (world / "whole-edit" / name).read_bytes()
