"""Controls of an edit at the command line: of equal size, of the same kind, and never the edit itself."""

from __future__ import annotations

import json

import pytest
import torch

from locus.cli import execute
from locus.cli.edit.controls import NO_CONTROLS
from locus.delta import WeightDelta
from locus.mask import WeightMask
from tests.locus.cli.edit.test_direct_edits import QUICK, cache, edit, place  # noqa: F401
from tests.tiny import tiny_model


def deltas(out):
    """The edit's delta, then its controls'."""
    folders = [out, *sorted(out.glob("control-*"))]
    return [WeightDelta.load(folder / "delta.safetensors") for folder in folders]


def about(folder):
    return json.loads((folder / "edit.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rome", ("--layer", "1", *QUICK)),
        ("alphaedit", ("--most", "1", "--threshold", "0.5", *QUICK)),
        ("law", ("--most", "1", "--rounds", "1", *QUICK)),
        ("neuron-zero", ("--neurons", "0:3", "1:7")),
        ("neuron-selective", ("--neurons", "0:3", "1:7", "--prefixes", "0")),
        ("neuron-descent", ("--neurons", "0:3", "1:7", "--prefixes", "0", "--enough", "1e-6")),
    ],
)
def test_an_edit_that_chooses_its_place_has_controls_at_other_places(place, tmp_path, method, options):  # noqa: F811
    """Before, the default edit's control was the edit itself, bit for bit, and rome's had three times its weights."""
    out, n = tmp_path / "edit", 2 if "--neurons" in options else 1
    asked = ("--method", method, "--controls", str(n), *options, "-q")
    assert edit(place, out, *asked) == 0
    mine, *controls = deltas(out)
    assert len(controls) == n and len({delta.id for delta in (mine, *controls)}) == n + 1
    for control in controls:
        assert control.n_changed == pytest.approx(mine.n_changed, rel=0.01)
        if "--neurons" not in options:
            assert not set(control.changes) & set(mine.changes), "in other layers"
    assert NO_CONTROLS not in about(out)
    assert edit(place, out, *asked, "--resume") == 0
    assert [delta.id for delta in deltas(out)] == [delta.id for delta in (mine, *controls)]


def test_a_place_where_the_edit_has_no_effect_is_no_control(place, tmp_path):  # noqa: F811
    """What the last layer writes at the subject's position reaches no prediction: such an edit changes nothing."""
    out = tmp_path / "edit"
    assert edit(place, out, "--method", "rome", "--layer", "1", "--controls", "2", *QUICK, "-q") == 0
    (control,) = deltas(out)[1:]
    assert set(control.changes) == {"model.layers.0.mlp.down_proj.weight"}
    assert about(out)[NO_CONTROLS].startswith("1 of 2 made: no more than 2 controls can be made")


def test_where_no_control_can_be_made_the_edit_says_so(place, tmp_path, capsys):  # noqa: F811
    """Two of three layers are edited: one other layer is left."""
    out = tmp_path / "edit"
    assert edit(place, out, "--method", "memit", "--layers", "0", "1", "--controls", "1", *QUICK) == 0
    line = "controls: 0 of 1 made: no control can be made: the mask holds all of mlp.down_proj.weight in 2 of 3 layers"
    assert line in capsys.readouterr().err
    assert about(out)[NO_CONTROLS].startswith("0 of 1 made")
    assert not list(out.glob("control-*"))


@pytest.mark.parametrize("kind", ["elements", "columns", "union"])
def test_a_trained_edit_has_controls_of_its_masks_size(place, tmp_path, kind):  # noqa: F811
    """A mask of single weights was compared with whole neurons, one without parts with gate, up and down."""
    model = tiny_model("llama")
    source = torch.Generator().manual_seed(0)
    neurons = torch.rand(model.atlas.n_layers, model.atlas.d_mlp, generator=source)
    down = WeightMask.of_neurons(model.atlas, neurons < 0.1, ("down",))
    mask = {
        "elements": WeightMask.of_elements(
            {n: torch.rand(p.shape, generator=source) < 0.01 for n, p in model.module.named_parameters()}
        ),
        "columns": down,
        "union": down | WeightMask.of_neurons(model.atlas, neurons > 0.9, ("down",)),
    }[kind]
    mask.save(tmp_path / "mask.safetensors")
    out = tmp_path / "edit"
    trained = ("--mask", tmp_path / "mask.safetensors", "--method", "ga", "--steps", "1", "--min-steps", "1")
    assert edit(place, out, *trained, "--controls", "2", "-q") == 0
    assert [about(out / f"control-{i}")["mask"]["weights"] for i in (0, 1)] == [mask.n_weights] * 2
    assert len({delta.id for delta in deltas(out)}) == 3
    uniform = tmp_path / "uniform"
    assert edit(place, uniform, *trained, "--controls", "1", "--control-profile", "uniform", "-q") == 0
    assert about(uniform / "control-0")["mask"]["weights"] == mask.n_weights


def test_an_edit_that_changes_nothing_has_no_control(place, tmp_path):  # noqa: F811
    """A control of it would be the edit itself."""
    out = tmp_path / "edit"
    nothing = ("--method", "neuron-zero", "--neurons", "0:3", "--strength", "0", "--controls", "1")
    assert edit(place, out, *nothing, "-q") == 0
    assert "0 of 1 made: the edit changes nothing" in about(out)[NO_CONTROLS]
    assert not (out / "control-0").exists()


def test_help_says_how_many_a_verdict_takes(capsys):
    assert execute(["edit", "--help"]) == 0
    assert "takes 5" in " ".join(capsys.readouterr().out.split())


def test_the_audit_says_why_there_are_no_controls(place, tmp_path):  # noqa: F811
    out, judged = tmp_path / "edit", tmp_path / "audit"
    assert edit(place, out, "--method", "memit", "--layers", "0", "1", "--controls", "1", *QUICK, "-q") == 0
    model, facts = str(place / "model"), str(place / "forget.jsonl")
    assert execute(["audit", model, str(out), facts, "-o", str(judged), "--attacks", "none", "-q"]) == 0
    missing = {m["what"]: m["why"] for m in json.loads((judged / "audit.json").read_text("utf-8"))["missing"]}
    assert "no control can be made" in missing["controls of edited"]
