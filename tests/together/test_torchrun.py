"""Commands on several processes: the artefacts of one, and an orderly end when one is lost."""

from __future__ import annotations

import contextlib
import json
import signal
import time

import pytest

from locus.cli import execute
from locus.delta import WeightDelta
from tests.tiny import save_tiny, tiny_model
from tests.together.forked import job
from tests.together.test_resume import FACTS

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


LOCATE = ["locate", "model", "facts.jsonl", "--limit", "3", "--batch-tokens", "24", "-q"]
EDIT = [
    "edit", "model", "facts.jsonl", "--limit", "3", "--mask", "mask.safetensors", "--min-steps", "1",
    "--optimizer", "sgd", "--lr", "0.05", "--retain-term", "none", "--goal", "0", "--utility", "0", "-q",
]  # fmt: skip


def test_two_processes_locate_what_one_locates(world):
    for name in ("mask.safetensors", "scores.safetensors"):
        (world / name).unlink(missing_ok=True)
    with contextlib.chdir(world):
        assert execute([*LOCATE, "-o", "mask.safetensors", "--scores", "scores.safetensors"]) == 0
    shared = [*LOCATE, "-o", "mask2.safetensors", "--scores", "scores2.safetensors"]
    children = job(lambda: execute(shared), 2, world / "logs", world)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    for name in ("mask", "scores"):
        assert (world / f"{name}2.safetensors").read_bytes() == (world / f"{name}.safetensors").read_bytes()


def test_two_processes_edit_as_one_does_and_the_first_writes(world):
    with contextlib.chdir(world):
        assert execute([*LOCATE, "-o", "mask.safetensors"]) == 0
        assert execute([*EDIT, "--steps", "2", "-o", "edit", "--resume"]) == 0
        assert execute([*EDIT, "--steps", "3", "-o", "other", "--resume"]) == 0
    out = "edit-by-two"
    shared = [*EDIT, "--steps", "2", "-o", out, "--controls", "1", "--shard"]
    children = job(lambda: execute(shared), 2, world / "logs", world)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    ours, theirs = (WeightDelta.load(world / name / "delta.safetensors") for name in ("edit", out))
    assert set(ours.changes) == set(theirs.changes) and ours.norm > 1e-3
    for name, change in ours.changes.items():
        assert (change.new - theirs.changes[name].new).abs().max() < 1e-5
    assert {path.name for path in (world / out).iterdir()} >= {
        "delta.safetensors",
        "edit.json",
        "history.jsonl",
    }
    assert (world / out / "control-0" / "edit.json").exists() and not (world / out / ".resume").exists()


def test_a_lost_process_ends_an_edit_and_one_process_resumes_it(world):
    with contextlib.chdir(world):
        assert execute([*LOCATE, "-o", "mask.safetensors"]) == 0
    command = [*EDIT, "--steps", "40", "--save-every", "1", "-o", "cut", "--floor", "0", "--max-kl", "0"]
    children = job(lambda: execute([*command, "--shard"]), 2, world / "logs", world)
    state, deadline = world / "cut" / ".resume" / "state.safetensors", time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < deadline, [child.said for child in children]
        time.sleep(0.01)
    children[1].kill()
    assert children[1].wait() == -signal.SIGKILL
    assert children[0].wait() == 1
    lines = children[0].said.splitlines()
    assert len(lines) == 1 and "--resume" in lines[0] and "lost" in lines[0], lines
    assert not (world / "cut" / "delta.safetensors").exists()
    with contextlib.chdir(world):
        assert execute([*command, "--resume"]) == 0
    history = [
        json.loads(line)["step"] for line in (world / "cut" / "history.jsonl").read_text().splitlines()
    ]
    assert history == list(range(1, 41))


def test_two_processes_audit_what_one_audits(world):
    with contextlib.chdir(world):
        assert execute([*LOCATE, "-o", "mask.safetensors"]) == 0
        assert execute([*EDIT, "--steps", "2", "-o", "edit", "--resume"]) == 0
        assert execute([*EDIT, "--steps", "3", "-o", "other", "--resume"]) == 0
    kept = [{"id": "kept", "prompt": "The city of Rome is in", "target": " Italy", "subject": "Rome"}]
    (world / "kept.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    audit = ["audit", "model", "edit", "facts.jsonl", "--retain", "kept.jsonl", "--attacks", "lens", "choice",
             "relearn", "strength", "--control", "other", "-q"]  # fmt: skip
    with contextlib.chdir(world):
        assert execute([*audit, "-o", "audit-by-one"]) == 0
    children = job(lambda: execute([*audit, "-o", "audit-by-two"]), 2, world / "logs", world)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    one, two = (_timeless(world / f"audit-by-{n}" / "audit.json") for n in ("one", "two"))
    assert one == two and len(one["states"]) == 3


def _timeless(path):
    """The document without how long it took."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if "seconds" not in k}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return strip(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*EDIT, "--method", "whp"], "locus edit --method whp runs in one process"),
        ([*LOCATE, "--method", "random,saliency"], "several methods runs in one process"),
    ],
)
def test_what_cannot_be_shared_is_refused_once(world, command, words):
    children = job(lambda: execute([*command, "-o", "refused"]), 2, world / "logs", world)
    codes = sorted(child.wait() for child in children)
    said = [line for child in children for line in child.said.splitlines()]
    assert codes == [1, 2] and len(said) == 1 and words in said[0]


def test_a_command_that_shares_nothing_refuses_several_processes(world):
    children = job(lambda: execute(["export", "model", "--delta", "d", "-o", "x"]), 2, world / "logs", world)
    codes = sorted(child.wait() for child in children)
    said = [line for child in children for line in child.said.splitlines()]
    assert codes == [1, 2] and said == ["locus: locus export runs in one process: start it without torchrun"]
