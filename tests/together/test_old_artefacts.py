"""Every artefact that version 0.1.0 wrote is read by this one: `tests/data/version_0_1_0` was written by it.

The folder holds a tiny model, facts, and what trace, lens, locate, edit, export and audit made of them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from locus.audit import read_audit
from locus.checkpoint import Checkpoint
from locus.checkpoint_diff import diff
from locus.checkpoint_export import export, revert
from locus.cli import execute
from locus.delta import WeightDelta
from locus.fact import read_facts
from locus.lens import load_grids
from locus.mask import WeightMask
from locus.report import audit_report, terminal_table, trace_report
from locus.scores import NeuronScores
from locus.trace import Trace
from tracing.tuned_lens import TunedLens

OLD = Path(__file__).parents[1] / "data" / "version_0_1_0"


@pytest.fixture
def old(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_facts():
    assert [fact.id for fact in read_facts(OLD / "facts.jsonl")] == ["tower", "capital", "tongue"]


def test_trace_and_its_page(old):
    trace = Trace.load(old / "trace")
    assert [fact.fact_id for fact in trace.facts] == ["tower", "capital", "tongue"]
    for fact in trace.facts:
        assert set(fact.scores) == {"block", "mlp", "attn"}
        for grid in fact.scores.values():
            assert grid.shape[1] == len(fact.tokens) and torch.isfinite(grid).all()
    assert "Eiffel" in trace_report(trace, old / "page").read_text("utf-8")


def test_lens(old):
    with pytest.warns(UserWarning, match="block_out is now called resid_post"):
        grids = load_grids(old / "lens" / "lens.safetensors")
    assert {grid.site for grid in grids} == {"resid_post"}
    assert len(grids) == 3 and all(torch.isfinite(grid.prob).all() for grid in grids)


def test_scores_and_masks(old):
    scores = NeuronScores.load(old / "scores.safetensors")
    mask = WeightMask.load(old / "mask.safetensors")
    assert scores.top(budget=0.05).digest == mask.digest
    assert WeightMask.load(old / "elements.safetensors").n_weights > 0


def test_tuned_lens(old):
    assert TunedLens.load(old / "tuned.safetensors")


@pytest.mark.parametrize("edit", ["edit", "edit/control-0", "rome"])
def test_delta_is_exported_and_reverted_to_the_bit(old, edit):
    delta = WeightDelta.load(old / edit / "delta.safetensors")
    export(Checkpoint(old / "model"), delta, old / "again")
    if edit == "edit":
        assert not diff(old / "again", old / "checkpoint").tensors
    revert(old / "again", delta, old / "base")
    assert not diff(old / "base", old / "model").tensors


def test_a_checkpoint_that_it_exported_is_reverted(old):
    revert(old / "checkpoint", WeightDelta.load(old / "edit" / "delta.safetensors"), old / "base")
    assert not diff(old / "base", old / "model").tensors


def test_audit_its_page_and_comparison(old):
    document = read_audit(old / "audit")
    assert terminal_table(document)
    assert audit_report(document, old / "page").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["lens", "model", "facts.jsonl", "--tuned", "tuned.safetensors", "-o", "out"],
        ["edit", "model", "facts.jsonl", "--mask", "mask.safetensors", "--method", "ga", "--steps", "1", "-o", "out"],
        ["audit", "model", "edit", "facts.jsonl", "--attacks", "none", "-o", "out"],
        ["audit", "model", "rome", "facts.jsonl", "--attacks", "none", "-o", "out"],
        ["combine", "scores.safetensors", "scores.safetensors", "-o", "both.safetensors"],
        ["diff", "model", "checkpoint", "--mask", "mask.safetensors", "--json"],
    ],
)  # fmt: skip
def test_commands_take_them(old, monkeypatch, capsys, command):
    monkeypatch.chdir(old)
    assert execute(command) == 0, capsys.readouterr().err
    if command[0] == "diff":
        assert json.loads(capsys.readouterr().out)
