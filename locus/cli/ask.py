"""`locus ask`: what the model writes after a prompt, before the edit and after it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from locus.cli.options import Loading, Talking

if TYPE_CHECKING:
    from locus.delta import WeightDelta
    from locus.model import Model

BASE, EDITED = "base", "edited"


def ask(
    model: str,
    /,
    *prompts: str,
    edited: str | None = None,
    tokens: int = 32,
    loading: Loading = Loading(),
    talking: Talking = Talking(),
) -> None:
    """Let the model continue prompts, before the edit and after it, side by side; greedily.

    Without PROMPTS they are read from stdin, one a line; at a terminal each is answered at once, and an empty line ends
    it. With --chat a prompt is asked as a turn of a conversation.

    Args:
        model: The base: checkpoint folder, hub id, or smollm2.
        prompts: What is to be continued, each in quotes.
        edited: The edit: a folder of `locus edit`, its delta.safetensors, or an exported checkpoint.
        tokens: At most this many tokens are written after each prompt.
    """
    from locus.cli.audit import read_state
    from locus.errors import InputError

    if tokens < 1:
        raise InputError(f"--tokens {tokens}: give 1 or more")
    loaded = loading.load(model)
    states = {BASE: loaded} | ({} if edited is None else {EDITED: read_state(edited, loading)})
    if prompts:
        with talking.progress():
            rows = greedy_answers(loaded, states, prompts, tokens)
        talking.finish({"answers": rows}, answer_lines(rows))
        return
    at_terminal = sys.stdin.isatty()
    if not at_terminal:
        rows = greedy_answers(
            loaded, states, [line.rstrip("\n") for line in sys.stdin if line.strip()], tokens
        )
        talking.finish({"answers": rows}, answer_lines(rows))
        return
    for prompt in _typed():
        (row,) = greedy_answers(loaded, states, [prompt], tokens)
        print(json.dumps(row, ensure_ascii=False) if talking.json else answer_lines([row]))


def greedy_answers(
    base: Model, states: Mapping[str, WeightDelta | Model], prompts: Sequence[str], tokens: int
) -> list[dict[str, str]]:
    """What each state writes after each prompt: rows of "prompt" and one answer by the state's name.

    Args:
        base: The model that deltas are applied to, and undone.
        states: Name -> the base, a delta on it, or another model.
        prompts: The prompts.
        tokens: At most so many tokens an answer.
    """
    from locus.audit.attacks.generation import generate
    from locus.audit.state import State
    from locus.delta import WeightDelta
    from locus.errors import InputError

    if blank := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise InputError(f"prompt {blank[0]} is empty: write what is to be continued")
    rows: list[dict[str, str]] = [{"prompt": prompt} for prompt in prompts]
    for name, one in states.items():
        state = State(name, "edit", base, one) if isinstance(one, WeightDelta) else State(name, "edit", one)
        with state.active() as asked:
            written = generate(asked, [_prompt_ids(asked, prompt) for prompt in prompts], tokens)
        for row, text in zip(rows, written, strict=True):
            row[name] = text
    return rows


def _prompt_ids(model: Model, prompt: str) -> tuple[int, ...]:
    """Tokens of a prompt as the audit asks it: in conversation with --chat."""
    from locus.fact import Example
    from locus.tokens import encode

    any_word = "the" if prompt[-1].isspace() else " the"
    return encode(model, Example(prompt, any_word)).prompt_ids


def _typed() -> Iterable[str]:
    """Prompts from a person, until an empty line or the end of the input."""
    while True:
        try:
            prompt = input("prompt> ")
        except EOFError:
            return
        if not prompt.strip():
            return
        yield prompt


def answer_lines(rows: Sequence[Mapping[str, str]]) -> Any:
    """A prompt, and under it each answer on a line of its own."""
    lines = []
    for row in rows:
        lines.append(row["prompt"])
        lines += [f"  {name:<7} {' '.join(text.split())}" for name, text in row.items() if name != "prompt"]
    return "\n".join(lines)
