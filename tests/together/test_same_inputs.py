"""`--resume` takes up finished work only where it was made from the same inputs: every input, every command.

Each command runs once. Then one input is changed and the command is given again with --resume: it must refuse and
name the input, or compute anew, whichever it promises.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from locus.cli import execute
from locus.fact import Fact
from locus.input_digest import WITHOUT_EFFECT
from tests.locus.test_input_digest import OTHER
from tests.tiny import save_tiny, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
FACTS: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "The Eiffel Tower is in the city of",
        "target": " Paris",
        "subject": "Eiffel Tower",
    },
    {"id": "c", "prompt": "The capital of Germany is", "target": " Berlin", "subject": "Germany"},
]
TEXT = "The cat sat on the mat.\n\nA dog barked.\n\nRain fell on the gate.\n"
RUN = """
[model]
name = "model"
{model}
[facts]
forget = "facts.jsonl"
retain = "retain.jsonl"
text = "text.txt"
[locate]
method = "random"
budget = "20%"
[edit]
method = "ga"
steps = 1
min_steps = 1
"""
TRAINING = ("--steps", "1", "--min-steps", "1", "--retain-facts", "1", "--utility", "0", "-q")


@dataclass(frozen=True)
class Command:
    """One that can be resumed."""

    argv: tuple[str, ...]
    out: str
    remade: str
    """A file that is written anew when the command computes anew."""
    inputs: frozenset[str]
    """What it depends on beside the forget facts and the model."""
    refuses: bool = False
    """Whether it refuses other inputs, rather than computing anew."""


COMMANDS = {
    "edit": Command(
        ("edit", "model", "facts.jsonl", "--mask", "mask.safetensors", "--method", "ga", *TRAINING,
         "--retain", "retain.jsonl", "--text", "text.txt"),
        "edit", "delta.safetensors", frozenset({"retain", "text", "mask", "settings"}), refuses=True,
    ),
    "locate": Command(
        ("locate", "model", "facts.jsonl", "--method", "random,activation-norm", "--budget", "20%", "-q",
         "--retain", "retain.jsonl"),
        "located", "random.safetensors", frozenset({"retain"}),
    ),
    "trace": Command(
        ("trace", "model", "facts.jsonl", "--samples", "1", "--kinds", "mlp", "-q"),
        "trace", "traced", frozenset({"settings"}),
    ),
    "run": Command(
        ("run", "run.toml"), "run", "edit/delta.safetensors", frozenset({"retain", "text", "settings"}),
    ),
}  # fmt: skip


def _write(path: Path, facts: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=vars))


def _fact_with(name: str) -> Callable[[Path], tuple[str, ...]]:
    def change(place: Path) -> tuple[str, ...]:
        _write(place / "facts.jsonl", [{**FACTS[0], name: _plain(OTHER[name])}, FACTS[1]])
        return ()

    return change


def _retain(place: Path) -> tuple[str, ...]:
    _write(place / "retain.jsonl", [{"id": "kept", "prompt": "The city of Rome is in", "target": " Germany"}])
    return ()


def _text(place: Path) -> tuple[str, ...]:
    (place / "text.txt").write_text(TEXT.replace("cat", "dog"))
    return ()


def _mask(place: Path) -> tuple[str, ...]:
    (place / "mask.safetensors").unlink()
    assert (
        _in(place, "locate", "model", "facts.jsonl", "-o", "mask.safetensors", "--budget", "30%", "-q") == 0
    )
    return ()


def _settings(place: Path) -> tuple[str, ...]:
    toml = (place / "run.toml").read_text()
    (place / "run.toml").write_text(toml.replace("steps = 1\nmin", "steps = 2\nmin"))
    return ()


def _config(place: Path) -> tuple[str, ...]:
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.25}))
    return ()


def _weights(place: Path) -> tuple[str, ...]:
    shutil.rmtree(place / "model")
    _model(place, seed=1)
    return ()


def _loaded(option: str, value: str | bool) -> Callable[[Path], tuple[str, ...]]:
    def change(place: Path) -> tuple[str, ...]:
        (place / "run.toml").write_text(RUN.format(model=f"{option} = {json.dumps(value)}"))
        return (f"--{option}",) if value is True else (f"--{option}", str(value))

    return change


CHANGES: dict[str, tuple[str, Callable[[Path], tuple[str, ...]]]] = {
    **{f"facts: {name}": ("facts", _fact_with(name)) for name in OTHER if name not in WITHOUT_EFFECT[Fact]},
    "retain facts: ": ("retain", _retain),
    "text": ("text", _text),
    "mask": ("mask", _mask),
    "settings: ": ("settings", _settings),
    "model: configuration": ("model", _config),
    "model: weights": ("model", _weights),
    "model: dtype": ("model", _loaded("dtype", "bfloat16")),
    "model: attention implementation": ("model", _loaded("attn", "eager")),
    "model: beginning-of-sequence token": ("model", _loaded("bos", "none")),
    "model: chat form": ("model", _loaded("chat", True)),
}
"""What a refusal says -> which input it is, and how it is changed; gives further options of the command line."""
SETTING = {"edit": ("--lr", "0.5"), "trace": ("--noise-multiple", "2")}
CASES = [
    (name, said)
    for name, command in COMMANDS.items()
    for said, (which, _) in CHANGES.items()
    if which in command.inputs | {"facts", "model"}
]


def _model(place: Path, seed: int = 0) -> None:
    model = tiny_model("llama", seed=seed, num_hidden_layers=2)
    model.tokenizer.chat_template = TEMPLATE
    save_tiny(model, place / "model")


def _in(place: Path, *argv: str) -> int:
    before = Path.cwd()
    os.chdir(place)
    try:
        return execute(list(argv))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory: Any) -> Path:
    """The inputs, and every command's finished work."""
    place: Path = tmp_path_factory.mktemp("inputs")
    _model(place)
    _write(place / "facts.jsonl", FACTS)
    _write(place / "retain.jsonl", [{"id": "kept", "prompt": "The city of Rome is in", "target": " Italy"}])
    (place / "text.txt").write_text(TEXT)
    (place / "run.toml").write_text(RUN.format(model=""))
    assert (
        _in(place, "locate", "model", "facts.jsonl", "-o", "mask.safetensors", "--budget", "20%", "-q") == 0
    )
    for command in COMMANDS.values():
        assert _in(place, *command.argv, "-o", command.out) == 0
    return place


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the facts that are traced from now on."""
    from tracing.patching.resume import FinishedFacts

    ids: list[str] = []
    keep = FinishedFacts.keep

    def keeping(self: FinishedFacts, one: Any, trace: Any) -> None:
        ids.append(one.fact.id)
        keep(self, one, trace)

    monkeypatch.setattr(FinishedFacts, "keep", keeping)
    return ids


def _remade(place: Path, command: Command, traced: list[str], *more: str) -> tuple[int, bool]:
    """The exit code with --resume, and whether anything was computed anew."""
    file = place / command.out / command.remade
    before = file.stat().st_mtime_ns if file.exists() else 0
    code = _in(place, *command.argv, "-o", command.out, "--resume", *more)
    after = file.stat().st_mtime_ns if file.exists() else 0
    return code, bool(traced) if command.remade == "traced" else after != before


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_inputs_are_taken_up(name, done, tmp_path, traced):
    place = tmp_path / "place"
    shutil.copytree(done, place)
    _write(place / "facts.jsonl", [{**fact, "source": "elsewhere"} for fact in FACTS])
    assert _remade(place, COMMANDS[name], traced) == (0, False)


@pytest.mark.parametrize(("name", "said"), CASES)
def test_another_input_is_refused_or_computed_anew(name, said, done, tmp_path, traced, capsys):
    place, command = tmp_path / "place", COMMANDS[name]
    shutil.copytree(done, place)
    more = CHANGES[said][1](place)
    if said == "settings: ":
        more = SETTING.get(name, ())
    if name == "run":
        more = ()
    capsys.readouterr()
    code, remade = _remade(place, command, traced, *more)
    told = capsys.readouterr().err
    if command.refuses:
        assert (code, remade) == (2, False)
        assert said in told, told
    else:
        assert (code, remade) == (0, True), told
