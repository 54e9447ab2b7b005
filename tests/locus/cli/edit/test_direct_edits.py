"""Direct edits at the command line: without a mask, by a list of neurons, with a strength, and back again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import locus
from locus.checkpoint_export import Checkpoint
from locus.cli import execute
from locus.delta import WeightDelta
from locus.forward import measure
from locus.mask import WeightMask
from tests.tiny import save_tiny, tiny_model

FACT = {
    "id": "eiffel",
    "prompt": "The Eiffel Tower is in the city of",
    "target": " Paris",
    "subject": "Eiffel Tower",
    "alternatives": [" Rome", " Berlin"],
}
QUICK = (
    "--target-prob-stop",
    "0",
    "--target-refusal",
    " Berlin",
    "--target-prefixes",
    "0",
    "--target-steps",
    "2",
    "--target-kl",
    "0",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("direct")
    save_tiny(tiny_model("llama"), place / "model")
    (place / "forget.jsonl").write_text(json.dumps(FACT) + "\n")
    (place / "retain.jsonl").write_text(
        json.dumps({**FACT, "id": "rome", "prompt": "The Colosseum is in", "subject": "Colosseum"}) + "\n"
    )
    text = "The city of Rome is in Italy. Berlin is the capital of Germany.\n\n"
    (place / "text.txt").write_text(text * 3)
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path / "cache"))


def edit(place, out, *options):
    argv = ["edit", place / "model", place / "forget.jsonl", "--text", place / "text.txt"]
    argv += ["--retain", place / "retain.jsonl", "-o", out, *options]
    return execute([str(a) for a in argv])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rome", ("--layer", "1", *QUICK)),
        ("memit", ("--layers", "0", "1", *QUICK)),
        ("alphaedit", ("--layers", "1", "--threshold", "0.5", *QUICK)),
        ("law", ("--layers", "1", "--rounds", "1", *QUICK)),
        ("neuron-zero", ("--neurons", "0:3", "1:7")),
        ("neuron-mean", ("--neurons", "0:3", "1:7")),
        ("neuron-direction", ("--neurons", "0:3", "--towards", "refusal")),
        ("neuron-selective", ("--neurons", "0:3", "1:7", "--prefixes", "0")),
        ("neuron-descent", ("--neurons", "0:3", "1:7", "--prefixes", "0", "--prob-stop", "1e-6")),
        ("knowledge-neurons", ("--neurons", "0:3", "--recipe", "update")),
        ("depn", ("--neurons", "0:3")),
    ],
)
def test_a_walk_without_locating(place, tmp_path, method, options):
    """Edit, export, diff, revert: only the weights chosen change, and every tensor comes back to the bit."""
    out = tmp_path / "edit"
    assert edit(place, out, "--method", method, *options, "-q") == 0
    mask = WeightMask.load(out / "mask.safetensors")
    delta = WeightDelta.load(out / "delta.safetensors")
    assert delta.n_changed > 0
    assert delta.outside(mask) == 0
    changed, base = tmp_path / "changed", tmp_path / "base"
    delta_file = str(out / "delta.safetensors")
    assert execute(["export", str(place / "model"), "--delta", delta_file, "-o", str(changed), "-q"]) == 0
    report = locus.diff(place / "model", changed, mask)
    assert report.n_off_mask == 0
    assert execute(["revert", str(changed), "--delta", delta_file, "-o", str(base), "-q"]) == 0
    assert Checkpoint(base).fingerprint() == Checkpoint(place / "model").fingerprint()


def test_without_a_mask_and_a_method_it_is_alphaedit(place, tmp_path):
    assert edit(place, tmp_path / "edit", "--threshold", "0.5", *QUICK, "-q") == 0
    about = json.loads((tmp_path / "edit" / "edit.json").read_text())
    assert about["method"] == "alphaedit" and (tmp_path / "edit" / "mask.safetensors").exists()
    mask = str(tmp_path / "edit" / "mask.safetensors")
    assert edit(place, tmp_path / "masked", "--mask", mask, "--steps", "1", "--min-steps", "1", "-q") == 0
    assert json.loads((tmp_path / "masked" / "edit.json").read_text())["method"] == "npo"


def test_an_edit_says_what_became_of_the_answers(place, tmp_path, capsys):
    """Asked again here, of the model as exported; a long target is judged by the token."""
    out, changed = tmp_path / "edit", tmp_path / "changed"
    assert edit(place, out, "--method", "neuron-zero", "--neurons", "0:3", "1:7") == 0
    line = capsys.readouterr().out.replace("\n", " ")
    told = json.loads((out / "edit.json").read_text())["answers"]
    assert (
        execute(
            [
                "export",
                str(place / "model"),
                "--delta",
                str(out / "delta.safetensors"),
                "-o",
                str(changed),
                "-q",
            ]
        )
        == 0
    )
    for folder, said in ((place / "model", told["before"]), (changed, told["after"])):
        scores = measure(locus.load_model(folder), locus.read_facts(place / "forget.jsonl"))
        assert said["prob"] == pytest.approx(float(scores.prob), rel=1e-4)
        assert said["right"] == int(scores.correct) and told["tokens"] == int(scores.n_tokens)
    assert told["before"]["prob"] != told["after"]["prob"]
    assert "p(target) " in line and f"right {told['before']['right']} → {told['after']['right']} of 1" in line


def test_a_new_target_is_written(place, tmp_path):
    options = (
        "--method",
        "rome",
        "--layer",
        "0",
        "--target-prefixes",
        "0",
        "--target-kl",
        "0",
        "--target-steps",
        "15",
    )
    assert edit(place, tmp_path / "edit", *options, "--target-new", " Germany", "-q") == 0
    model = locus.load_model(place / "model")
    (fact,) = locus.read_facts(place / "forget.jsonl")
    asked = [replace(fact, target=word) for word in (" Germany", " Paris", " Rome")]
    before = measure(model, asked).nll
    with WeightDelta.load(tmp_path / "edit" / "delta.safetensors").applied(model):
        after = measure(model, asked).nll
    assert after[0] < before[0] - 0.3
    assert after[0] < after[1:].min()


def test_a_dose_leaves_its_curve_and_its_picture(place, tmp_path, capsys):
    options = ("--method", "neuron-zero", "--neurons", "0:3", "1:7", "--strength-curve", "0", "1")
    assert edit(place, tmp_path / "edit", *options) == 0
    assert (tmp_path / "edit" / "strength.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "p(target)" in said
    assert edit(place, tmp_path / "other", *options, "--json", "-q") == 0
    points = json.loads(capsys.readouterr().out)["outcome"]["strength_curve"]
    assert [point["strength"] for point in points] == [0.0, 1.0]
    assert points[0]["retain_right"] in (None, 1.0)


def test_a_mask_is_widened_to_its_layers_only_when_asked(place, tmp_path):
    model = locus.load_model(place / "model")
    from editors.key_value.neuron_parts import neuron_mask

    neuron_mask(model, ["1:5", "1:9"], "values").save(tmp_path / "mask.safetensors")
    options = ("--method", "rome", "--mask", str(tmp_path / "mask.safetensors"), "--ridge", "0.1", *QUICK)
    assert edit(place, tmp_path / "narrow", *options, "-q") == 0
    assert WeightDelta.load(tmp_path / "narrow" / "delta.safetensors").n_changed <= 2 * 32
    assert not (tmp_path / "narrow" / "mask.safetensors").exists()
    assert edit(place, tmp_path / "wide", *options, "--widen", "-q") == 0
    assert WeightDelta.load(tmp_path / "wide" / "delta.safetensors").n_changed > 30 * 32
    wide = WeightMask.load(tmp_path / "wide" / "mask.safetensors")
    assert wide.neurons_per_layer(model.atlas).tolist() == [0, 48, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "npo"), "needs --mask"),
        (("--method", "neuron-zero"), "give --mask, or --neurons"),
        (("--method", "neuron-zero", "--neurons", "3:1"), "layers 0 to 2"),
        (("--method", "rome", "--layer", "7"), "layer 7"),
        (("--method", "neuron-zero", "--neurons", "1:1", "--target-new", " Rome"), "cannot rewrite"),
    ],
)
def test_what_is_missing_is_said(place, tmp_path, capsys, options, said):
    assert edit(place, tmp_path / "edit", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locus: ")]
    assert said in line
