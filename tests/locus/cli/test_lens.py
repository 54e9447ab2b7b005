"""`locus lens`: through a tuned lens that is trained, kept and refused; and who adds to the target's logit."""

from __future__ import annotations

import json

import pytest
import torch

from locus.cli import execute
from locus.files.artefact import load_json, load_tensors
from locus.lens import load_grids
from tests.tiny import save_tiny, tiny_model
from tracing.tuned_lens import TunedLens, TunedLensTraining

FACT = {
    "id": "eiffel",
    "prompt": "The Eiffel Tower is in the city of",
    "target": " Paris",
    "subject": "Eiffel Tower",
}
TEXT = "The city of Rome is in Italy.\n\nBerlin is the capital of Germany.\n\nThe Eiffel Tower is in Paris.\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lens")
    save_tiny(tiny_model("gpt2"), place / "model")
    save_tiny(tiny_model("gpt2", seed=1), place / "other")
    (place / "facts.jsonl").write_text(json.dumps(FACT) + "\n")
    (place / "text.txt").write_text(TEXT)
    return place


def _lens(place, out, *more, model="model"):
    return execute(
        ["lens", str(place / model), str(place / "facts.jsonl"), "-o", str(out), "-q", *map(str, more)]
    )


def test_a_tuned_lens_is_trained_once_and_refuses_another_model(place, tmp_path, capsys):
    tuned = tmp_path / "tuned.safetensors"
    more = ["--tuned", tuned, "--text", place / "text.txt", "--steps", "3"]
    assert _lens(place, tmp_path / "a", *more) == 0
    before = tuned.read_bytes()
    assert _lens(place, tmp_path / "b", *more) == 0
    assert tuned.read_bytes() == before
    (grid,), (again,) = (load_grids(tmp_path / name / "lens.safetensors") for name in "ab")
    assert torch.equal(grid.prob, again.prob)
    assert load_json(tmp_path / "a" / "lens.json", "lens-info")["lens"] == "tuned lens"
    assert _lens(place, tmp_path / "plain") == 0
    (plain,) = load_grids(tmp_path / "plain" / "lens.safetensors")
    assert not torch.allclose(grid.prob[0], plain.prob[0]) and torch.equal(grid.prob[-1], plain.prob[-1])
    assert _lens(place, tmp_path / "c", *more, model="other") == 2
    assert "another model" in capsys.readouterr().err
    assert _lens(place, tmp_path / "d", *more, "--sites", "mlp_out") == 2
    assert not list(tmp_path.glob("tuned-training*"))


def test_a_stopped_training_goes_on(place, tmp_path, monkeypatch):
    tuned, whole = tmp_path / "tuned.safetensors", tmp_path / "whole.safetensors"
    more = ["--text", place / "text.txt", "--steps", "30"]
    assert _lens(place, tmp_path / "w", "--tuned", whole, *more) == 0
    keep = TunedLensTraining._keep

    def kept_then_killed(self, *given):
        keep(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TunedLensTraining, "_keep", kept_then_killed)
        assert _lens(place, tmp_path / "a", "--tuned", tuned, *more) != 0
    assert not tuned.exists() and (tmp_path / "tuned-training").is_dir()
    assert _lens(place, tmp_path / "a", "--tuned", tuned, *more, "--resume") == 0
    assert torch.equal(TunedLens.load(tuned).matrices, TunedLens.load(whole).matrices)


def test_attribution_adds_up_to_the_logit(place, tmp_path):
    out = tmp_path / "out"
    assert _lens(place, out, "--attribution") == 0
    (row,) = load_json(out / "attribution.json", "direct-attribution-info")["facts"].values()
    total = sum(row["attn"]) + sum(row["mlp"]) + row["embed"] + row["constant"]
    assert total == pytest.approx(row["logit"], abs=1e-4)
    tensors, _ = load_tensors(out / "attribution.safetensors", "direct-attribution")
    best = row["heads"][0]
    assert best["logits"] == float(tensors["eiffel/head"].max())
    assert best["logits"] == float(tensors["eiffel/head"][best["layer"], best["index"]])
    assert (out / "eiffel-attribution.png").stat().st_size > 1000
