"""A few hundred hostile files; `python -m tests.together.fuzz` tries ten thousand."""

from __future__ import annotations

import random

from tests.together import mutation
from tests.together.fuzz import TARGETS, fuzz, try_once


def test_hostile_files_are_read_or_refused_in_one_line(tmp_path):
    assert fuzz(tmp_path, 5 * len(TARGETS), seed=2) == {}


def test_the_fuzzer_sees_a_traceback_a_hang_and_a_way_out(tmp_path, monkeypatch):
    good = tmp_path / "world" / "facts" / "facts.jsonl"
    good.parent.mkdir(parents=True)
    good.write_text('{"prompt": "a", "target": " b"}\n')
    (tmp_path / "scratch").mkdir()

    def fault(use):
        from tests.together.fuzz import Target

        target = Target("facts/facts.jsonl", use)
        return try_once(target, tmp_path / "world", tmp_path / "scratch", random.Random(0))

    assert fault(lambda place, out: None) is None
    assert fault(lambda place, out: {}["missing"]).startswith("KeyError")
    assert "outside" in fault(lambda place, out: (out / ".." / "evil").write_text("out"))
    monkeypatch.setattr("tests.together.fuzz.LIMIT_SECONDS", 0.2)
    assert fault(lambda place, out: [None for _ in iter(int, 1)]).startswith("hang")


def test_a_forged_file_carries_its_own_digest(tmp_path):
    import torch

    from locus.files.artefact import load_tensors, save_tensors

    save_tensors(tmp_path / "a.safetensors", "mask", {"x": torch.arange(3)}, {"about": 1})
    data = (tmp_path / "a.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = mutation.json.loads(data[8 : 8 + n])
    header["__metadata__"]["locus"] = '{"format": "mask", "version": 1, "about": 2}'
    (tmp_path / "b.safetensors").write_bytes(mutation.signed(header, data[8 + n :]))
    assert load_tensors(tmp_path / "b.safetensors", "mask")[1] == {"about": 2}
