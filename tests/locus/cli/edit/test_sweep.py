"""`locus edit --sweep` on a tiny model and what it answers anyway: points, picture, resumption, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from locus.cli import execute
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import collate, label_logits, measure
from locus.model import load_model
from locus.tokens import encode
from tests.tiny import save_tiny, tiny_model
from tracing import GradientSaliency

PROMPTS = [
    f"The {word} Tower is in the"
    for word in ("Eiffel", "Gothic", "Marble", "Silver", "Wooden", "Copper", "Old")
]


@torch.no_grad()
def believed(model, prompt):
    """A fact that the model has right: its own first choice, where that can stand behind the prompt."""
    one = encode(model, Fact("any", prompt, " city"))
    token = int(label_logits(model, collate([one], [0]))[0].argmax())
    try:
        fact = Fact(prompt.split()[1], prompt, model.tokenizer.decode([token]), held_out=True)
        return fact if measure(model, [fact]).correct.all() else None
    except InputError:
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    save_tiny(tiny_model("llama"), place / "model")
    model = load_model(str(place / "model"))
    held_out = [fact for prompt in PROMPTS if (fact := believed(model, prompt)) is not None]
    assert held_out, "no prompt whose first choice can be a target: take other prompts"
    forget = [Fact("a", "The cat sat on the", " mat"), Fact("b", "A dog lives in the", " house")]
    GradientSaliency().run(model, forget).save(place / "scores.safetensors")
    for name, facts in (("forget", forget), ("retain", held_out)):
        lines = [
            json.dumps({"id": f.id, "prompt": f.prompt, "target": f.target, "held_out": f.held_out})
            for f in facts
        ]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    (place / "text.txt").write_text("The cat sat on the mat.\n\nA dog barked.\n\nRain fell on the gate.\n")
    return place


def command(place, out):
    return [
        *("edit", str(place / "model"), str(place / "forget.jsonl"), "-o", str(place / out)),
        *("--sweep", str(place / "scores.safetensors"), "--retain", str(place / "retain.jsonl")),
        *("--text", str(place / "text.txt"), "--budgets", "5%", "10%", "--strengths", "0", "1"),
        *("--controls", "1", "--method", "npo", "--steps", "1", "--json"),
    ]


def test_points_picture_and_resumption(place, capsys):
    assert execute(command(place, "sweep")) == 0
    said = json.loads(capsys.readouterr().out)
    points = said["points"]
    assert [(p["budget"], p["control"], p["strength"]) for p in points] == [
        (budget, control, strength)
        for budget in ("5%", "10%")
        for control in (None, 0)
        for strength in (0.0, 1.0)
    ]
    for p in points:
        if p["strength"] == 0:
            assert p["utility"] == 1.0
            assert p["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(p["control"] is None for p in said["front"])
    assert (place / "sweep" / "sweep.png").stat().st_size > 1000
    before = (place / "sweep" / "sweep.json").read_bytes()
    assert execute(command(place, "sweep")) == 2
    assert "--resume" in capsys.readouterr().err
    assert execute([*command(place, "sweep"), "--resume"]) == 0
    assert (place / "sweep" / "sweep.json").read_bytes() == before


def test_an_edit_takes_a_mask_or_a_sweep(place, capsys):
    both = [*command(place, "both"), "--mask", str(place / "scores.safetensors")]
    assert execute(both) == 2
    assert "--sweep" in capsys.readouterr().err


def test_utility_needs_held_out_facts(place, capsys):
    given = command(place, "unjudged")
    del given[given.index("--retain") : given.index("--retain") + 2]
    assert execute([*given, "--retain-term", "none"]) == 2
    assert "held_out" in capsys.readouterr().err
