"""What an edit can be given on the command line: plain text, conversations, neighbours, generated text, an estimate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from locus.cli import execute
from locus.fact import Example, Fact, neighbours_of, read_facts
from locus.mask import WeightMask, shapes_of
from locus.model import load_model
from tests.tiny import save_tiny, tiny_facts, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("material")
    model = tiny_model("smollm", num_hidden_layers=2)
    model.tokenizer.chat_template = TEMPLATE
    save_tiny(model, place / "model")
    loaded = load_model(place / "model")
    WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(loaded.module), loaded.fingerprint).save(
        place / "mask.safetensors"
    )
    (place / "passage.txt").write_text(
        "The cat sat on the mat and looked at the rain. It fell on the gate.\n\nA dog barked at the moon.\n"
    )
    lines = [
        {
            "id": f.id,
            "prompt": f.prompt,
            "target": f.target,
            "relation": f.relation,
            "neighbours": [vars(n) for n in f.neighbours],
        }
        for f in tiny_facts()
    ]
    (place / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def edit(place: Path, facts: str, *more: str) -> int:
    return execute(
        ["edit", str(place / "model"), str(place / facts), "--mask", str(place / "mask.safetensors"),
         "--steps", "2", "--min-steps", "1", "-q", *more]
    )  # fmt: skip


def about(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "edit.json").read_text())
    return found


def test_a_passage_is_forgotten_block_by_block(place: Path) -> None:
    """Every word but a block's first is pushed; the loss falls, so the passage becomes less probable."""
    assert edit(place, "passage.txt", "--lr", "0.02", "-o", str(place / "passage")) == 0
    done = about(place / "passage")
    assert len(done["forget"]) == 2
    history = [json.loads(line) for line in (place / "passage" / "history.jsonl").read_text().splitlines()]
    assert history[1]["forget_loss"] < history[0]["forget_loss"]
    assert done["rounding"]["n_wanted"] > 0


def test_in_conversation_other_tokens_are_trained_on(place: Path, capsys: Any) -> None:
    for name, flags in (("plain", ()), ("chat", ("--chat",))):
        assert edit(place, "facts.jsonl", *flags, "-o", str(place / name)) == 0
    plain, chat = about(place / "plain"), about(place / "chat")
    assert chat["chat"] is True and "chat" not in plain
    assert chat["outcome"]["forget_prob_before"] != plain["outcome"]["forget_prob_before"]
    assert edit(place, "facts.jsonl", "-o", str(place / "chat"), "--resume") == 2
    assert "(model: chat form)" in capsys.readouterr().err


def test_neighbours_can_be_what_stays(place: Path) -> None:
    assert edit(place, "facts.jsonl", "--retain", "neighbours", "-o", str(place / "near")) == 0
    assert about(place / "near")["retain"] == ["tower neighbour 1", "capital neighbour 1"]


def test_every_third_neighbour_is_held_out() -> None:
    facts = [
        Fact("a", "x is", " y", relation="r", neighbours=tuple(Example(f"{i} is", " z") for i in range(4))),
        Fact("b", "u is", " v", neighbours=(Example("w is", " z"),)),
    ]
    kept = neighbours_of(facts)
    assert [f.held_out for f in kept] == [False, False, True, False, False]
    assert [f.relation for f in kept] == ["r", "r", "r", "r", None]
    assert len({f.id for f in kept}) == 5


def test_no_neighbours_is_told(place: Path, capsys: Any) -> None:
    assert edit(place, "passage.txt", "--retain", "neighbours", "-o", str(place / "none")) == 2
    assert "none of the facts has neighbours" in capsys.readouterr().err


def test_generated_text_is_kept_and_taken_again(place: Path) -> None:
    out = place / "generated"
    assert edit(place, "facts.jsonl", "--text", "generated", "-o", str(out)) == 0
    text = (out / "text.txt").read_text()
    assert len(read_facts(out / "text.txt")) > 2
    assert edit(place, "facts.jsonl", "--text", "generated", "-o", str(out), "--resume") == 0
    assert (out / "text.txt").read_text() == text


def test_the_history_becomes_scalars(place: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = place / "board"
    assert edit(place, "facts.jsonl", "--tensorboard", "-o", str(out)) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    scalars = events.Scalars("forget_prob")
    assert [s.step for s in scalars] == [record["step"] for record in history] == [1, 2]
    assert [s.value for s in scalars] == pytest.approx([record["forget_prob"] for record in history])
    assert "utility" not in events.Tags()["scalars"]  # never looked at in two steps


def test_without_tensorboard_one_line_says_what_to_install(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert edit(place, "facts.jsonl", "--tensorboard", "-o", str(place / "missing")) == 2
    said = capsys.readouterr().err
    assert 'pip install "locus-unlearn[tensorboard]"' in said and said.count("\n") == 1
    assert not (place / "missing").exists()


def test_a_memory_estimate_reads_no_weight_and_writes_nothing(place: Path, capsys: Any) -> None:
    (weights,) = (place / "model").glob("*.safetensors")
    hidden = weights.rename(weights.with_suffix(".hidden"))
    before = set(place.rglob("*"))
    try:
        command = ["edit", str(place / "model"), str(place / "facts.jsonl"), "--estimate-memory", "--json"]
        assert execute([*command, "--mask", str(place / "mask.safetensors")]) == 0
    finally:
        hidden.rename(weights)
    said = json.loads(capsys.readouterr().out)
    assert said["recomputed"]["activations"] < said["kept"]["activations"]
    assert said["kept"]["peak"] > said["kept"]["weights"] > 0
    assert {*place.rglob("*")} == before - {hidden} | {weights}
    for more, words in (((), "needs --mask"), (("--method", "rome"), "rome trains nothing")):
        mask = () if not more else ("--mask", str(place / "mask.safetensors"))
        assert execute([*command, *more, *mask]) == 2
        assert words in capsys.readouterr().err


def test_an_edit_needs_a_folder(place: Path, capsys: Any) -> None:
    assert edit(place, "facts.jsonl") == 2
    assert "-o FOLDER" in capsys.readouterr().err
