"""A few random kills of every command; `python -m tests.together.kills` does five hundred."""

from __future__ import annotations

import random

import pytest

from tests.together.kills import COMMANDS, Tally, World, kill


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_is_resumed_to_the_undisturbed_result(world, name):
    assert kill(world, name, random.Random(name), Tally()) == []


def test_the_check_sees_a_broken_artefact_and_a_difference(world):
    out = world.place / "spoilt"
    out.mkdir()
    for path in (world.place / "whole-edit").iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    assert not list(world.broken("spoilt")) and not list(world.differing("edit", "spoilt"))
    data = bytearray((out / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "delta.safetensors").write_bytes(data)
    (out / "history.jsonl").unlink()
    assert [line.split(":")[0] for line in world.broken("spoilt")] == ["spoilt/delta.safetensors"]
    assert sorted(world.differing("edit", "spoilt")) == [
        "delta.safetensors: differs",
        "history.jsonl: only in one",
    ]
