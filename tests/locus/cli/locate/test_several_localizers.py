"""`locus locate` with several methods, thresholds, and masks that `locus edit` takes."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from locus.cli import execute
from locus.files.artefact import load_json
from locus.mask import WeightMask
from locus.scores import NeuronScores
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.together.test_walk import _facts
from tracing import LOCALIZERS
from tracing.score_algebra import rank_average

QUICK = ["--steps", "1", "--min-steps", "1", "--utility", "0", "--max-kl", "0", "--retain-facts", "1", "-q"]
FEWER = {
    "slimming": ":steps=2",
    "hard-concrete": ":steps=2",
    "knowledge-neurons": ":steps=2",
    "depn": ":steps=2",
    "lookup-probe": ":least=2",
}
EVERY = ",".join(name + FEWER.get(name, "") for name in LOCALIZERS)
METHODS = "saliency,slimming:steps=2,random,disagreeing-tensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("localizers")
    save_tiny(tiny_model("llama"), place / "model")
    relations = ("city", "country", "river")
    words = ("Eiffel", "Gothic", "Marble", "Silver", "Wooden", "Copper")
    facts = [{**fact, "relation": relations[i % 3]} for i, fact in enumerate(_facts(words, False))]
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    others = [{**fact, "target": " Rome"} for fact in _facts(("Green", "Yellow"), False)]
    kept = "".join(json.dumps(fact) + "\n" for fact in [*_facts(("Golden", "Broken"), False), *others])
    (place / "keep.jsonl").write_text(kept)
    return place


def _locate(place, *more):
    return execute(["locate", str(place / "model"), str(place / "facts.jsonl"), *map(str, more)])


def _compare(place, name, *more):
    out = place / name
    how = ["--retain", place / "keep.jsonl", "--budget", "2%", "-o", out, "-q"]
    assert _locate(place, *how, *more) == 0
    return out


@pytest.fixture(scope="module")
def masks(place):
    """Of every localizer, on one fact of each relation."""
    return _compare(place, "masks", "--method", EVERY, "--limit", "3")


@pytest.fixture(scope="module")
def compared(place):
    return _compare(place, "compared", "--method", METHODS, "--repetitions", "2")


@pytest.mark.parametrize("name", LOCALIZERS)
def test_every_mask_is_taken_by_edit_as_it_is(name, place, masks):
    edit = [
        "edit",
        str(place / "model"),
        str(place / "facts.jsonl"),
        "--retain",
        str(place / "keep.jsonl"),
    ]
    mask = masks / f"{name}.safetensors"
    assert execute([*edit, "--mask", str(mask), "-o", str(place / f"edit-{name}"), *QUICK]) == 0
    assert (place / f"edit-{name}" / "delta.safetensors").is_file()


def test_the_matrix_and_the_stability_are_those_of_the_masks(compared):
    found = load_json(compared / "locate.json", "locate")
    a, b = (WeightMask.load(compared / f"{name}.safetensors") for name in ("saliency", "slimming"))
    shared = (a & b).n_weights / min(a.n_weights, b.n_weights)
    assert found["overlap"]["saliency"]["slimming"] == pytest.approx(shared)
    assert found["overlap"]["random"]["random"] == 1
    assert found["methods"]["slimming"]["stability"]["paraphrases"]["n"] == 1
    assert set(found["methods"]["random"]["stability"]) == {"paraphrases", "facts", "seeds"}
    page = (compared / "report.html").read_text()
    assert "disagreeing-tensors" in page and "half of the facts" in page and "river" in page


def test_a_resumed_comparison_takes_what_is_there(place, compared, capsys):
    more = ["--retain", place / "keep.jsonl", "--budget", "2%", "--repetitions", "2", "-o", compared, "-q"]
    assert _locate(place, "--method", METHODS, *more) == 2
    assert "--resume" in capsys.readouterr().err
    before = (compared / "saliency.json").stat().st_mtime_ns
    changed = (compared / "slimming.json").stat().st_mtime_ns
    methods = METHODS.replace("slimming:steps=2", "slimming:steps=3")
    assert _locate(place, "--method", methods, "--resume", *more) == 0
    assert (compared / "saliency.json").stat().st_mtime_ns == before
    assert (compared / "slimming.json").stat().st_mtime_ns > changed


def test_one_refusal_does_not_stop_the_others(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert _locate(place, "--method", "disagreeing-tensors,random", "-o", out, "-q") == 0
    found = load_json(out / "locate.json", "locate")
    assert list(found["methods"]) == ["random"] and "retain set" in found["refused"]["disagreeing-tensors"]
    assert _locate(place, "--method", "disagreeing-tensors,", "-o", tmp_path / "b", "-q") == 2


def test_thresholds(place, tmp_path, capsys):
    mask, scores = tmp_path / "m.safetensors", tmp_path / "s.safetensors"
    assert (
        _locate(place, "--method", "depn", "--threshold", "paper", "-o", mask, "--scores", scores, "-q") == 0
    )
    chosen = NeuronScores.load(scores).values > 0.5
    assert int(WeightMask.load(mask).neurons_per_layer(tiny_model("llama").atlas).sum()) == int(chosen.sum())
    for method, cut, word in (
        ("depn", "99", "no score"),
        ("saliency", "paper", "none of its own"),
        ("depn", "x", "x"),
    ):
        assert _locate(place, "--method", method, "--threshold", cut, "-o", tmp_path / "n", "-q") == 2
        said = capsys.readouterr().err.strip()
        assert word in said and "\n" not in said


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("disagreeing-tensors", "disagreeing-tensors compares with a retain set and none was given"),
        ("contrastive-vectors", "no alternatives"),
        ("weight-saliency --score wagle", "score 'wagle' compares with a retain set"),
        ("weight-saliency --groups 0", "groups is 0"),
        ("saliency --contrast ratio", "contrast 'ratio' compares with a retain set"),
        ("lookup-probe", "needs two answers that 4 facts each share in one relation"),
        ("lookup-probe --ridge 0", "ridge is 0"),
        ("traced-neurons --samples 0", "samples is 0"),
        ("fact-lookup --samples 0", "samples is 0"),
        ("slimming --steps -1", "steps is -1"),
        ("hard-concrete --temperature 0", "temperature is 0"),
        ("knowledge-neurons --steps 0", "steps is 0"),
        ("random-layers --n-layers 9", "n_layers is 9"),
    ],
)
def test_wrong_requests_are_refused_in_one_clear_line(method, words, place, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert _locate(place, "--method", *method.split(), "-o", out, "-q") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0]
    assert not out.exists()


def test_neurons_of_a_mixture_of_experts_are_refused_by_name(place, tmp_path, capsys):
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = tiny_tokenizer()
    config = MixtralConfig(**settings, num_key_value_heads=2, num_local_experts=2, vocab_size=len(tokenizer))
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    capsys.readouterr()
    facts, out = str(place / "facts.jsonl"), tmp_path / "m.safetensors"
    assert execute(["locate", str(tmp_path / "moe"), facts, "-o", str(out), "-q"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("locus: ")]
    assert len(said) == 1 and "is a mixture of experts" in said[0] and "layers.0" in said[0]
    assert not out.exists()


def test_wrong_lists_of_methods(place, tmp_path, capsys):
    out = ["-o", tmp_path / "out", "-q"]
    for method, word in (
        ("saliency,salience", "saliency"),
        ("random,random", "twice"),
        ("slimming:steps", "option=value"),
        ("slimming:stpes=3,random", "stpes"),
    ):
        assert _locate(place, "--method", method, *out) == 2
        assert word in capsys.readouterr().err
    assert _locate(place, "--method", "random,saliency", "--threshold", "1", *out) == 2
    assert not (tmp_path / "out").exists()


def test_scores_combine(place, compared, tmp_path, capsys):
    a, b = (str(compared / f"{name}.scores.safetensors") for name in ("saliency", "slimming"))
    out, mask = tmp_path / "c.safetensors", tmp_path / "m.safetensors"
    combine = ["combine", a, b, "-o", str(out), "-q"]
    assert execute([*combine, "--mask", str(mask), "--budget", "5"]) == 0
    expected = rank_average([NeuronScores.load(a), NeuronScores.load(b)])
    assert torch.equal(NeuronScores.load(out).values, expected.values)
    assert WeightMask.load(mask) == expected.top(5)
    assert execute([*combine, "--how", "minus", "--scale", "max", "--strength", "0.5"]) == 0
    parts = [NeuronScores.load(x).values.double() for x in (a, b)]
    difference = parts[0] / parts[0].abs().max() - 0.5 * parts[1] / parts[1].abs().max()
    torch.testing.assert_close(NeuronScores.load(out).values, difference.float())
    for wrong, word in (
        (["--how", "normalize"], "2 files"),
        (["--weights", "1"], "weights"),
        ([str(compared / "random.safetensors")], "neuron-scores"),
    ):
        assert execute([*combine, *wrong]) == 2
        assert word in capsys.readouterr().err
