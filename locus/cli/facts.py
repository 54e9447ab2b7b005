"""`locus facts`: how a file of facts is understood, and the same facts in our own form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from locus.cli.options import Loading, Talking
from locus.errors import InputError

if TYPE_CHECKING:
    from locus.fact import Fact
    from locus.model import Model

_WIDEST = 72
"""Characters of a prompt or a target that the table shows."""


def facts(
    file: str,
    /,
    *,
    format: str = "auto",
    show: int = 3,
    limit: int | None = None,
    model: str | None = None,
    write: Annotated[Path | None, Parameter(name=["--write", "-w"])] = None,
    loading: Loading = Loading(),
    talking: Talking = Talking(),
) -> None:
    """Show how a file of facts is understood: its format, the fields used, the first facts, the subjects found.

    Args:
        file: Fact file, hf://owner/dataset, or demo-forget / demo-retain.
        format: Read it as this format, whatever fields it has; those that the format does not use are dropped.
        show: How many facts to show.
        limit: Read only the first N facts.
        model: Count tokens with this model's tokenizer; its weights are not read.
        write: Write the facts to this file in locus's own form (JSON lines).
    """
    from rich.markup import escape
    from rich.table import Table

    from locus.fact import read_fact_file, write_facts

    if show < 0:
        raise InputError(f"--show {show}: give 0 or more")
    read = read_fact_file(file, format, limit)
    counts = None if model is None else _token_counts(loading.shape(model), read.facts)
    if write is not None:
        write_facts(write, read.facts)
    about = _summary(read.facts, counts)
    table = Table(box=None, pad_edge=False, title=f"{file}: {read.format}", title_justify="left")
    for column in ("fact", "prompt", "target", "subject"):
        table.add_column(column)
    for fact in read.facts[:show]:
        cells = (fact.id, repr(_short(fact.prompt)), repr(_short(fact.target)), fact.subject or "")
        table.add_row(*map(escape, cells))
    lines = [
        f"fields used: {', '.join(read.used) or 'none, it is plain text'}",
        *([f"left out: {', '.join(read.left_out)}"] if read.left_out else []),
        ", ".join(f"{name} {value}" for name, value in about.items() if value),
        *([f"written to {write}"] if write is not None else []),
    ]
    table.caption, table.caption_justify = escape("\n".join(lines)), "left"
    shown = [_as_json(fact) for fact in read.facts[:show]]
    talking.finish(
        {
            "file": file,
            "format": read.format,
            "fields_used": list(read.used),
            "left_out": list(read.left_out),
            **about,
            "first": shown,
        },
        table,
    )


def _summary(facts: Sequence[Fact], counts: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
    """What there is of everything; tokens of prompt and target, the most of each, where they were counted."""
    about: dict[str, Any] = {
        "facts": len(facts),
        "subjects": sum(fact.subject is not None for fact in facts),
        "paraphrases": sum(len(fact.paraphrases) for fact in facts),
        "neighbours": sum(len(fact.neighbours) for fact in facts),
        "alternatives": sum(len(fact.alternatives) for fact in facts),
        "held_out": sum(fact.held_out for fact in facts),
    }
    if counts is not None:
        about["most prompt tokens"] = max(prompt for prompt, _ in counts)
        about["most target tokens"] = max(target for _, target in counts)
    return about


def _token_counts(model: Model, facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Tokens of each fact's prompt (BOS included) and target."""
    from locus.tokens import encode

    encoded = [encode(model, fact) for fact in facts]
    return [(one.target_start, one.n_target) for one in encoded]


def _as_json(fact: Fact) -> dict[str, Any]:
    return {
        "id": fact.id,
        "prompt": fact.prompt,
        "target": fact.target,
        "subject": fact.subject,
        "subject_span": None if fact.subject_span is None else list(fact.subject_span),
        "alternatives": list(fact.alternatives),
        "paraphrases": list(fact.paraphrases),
        "neighbours": [{"prompt": one.prompt, "target": one.target} for one in fact.neighbours],
        "source": fact.source,
    }


def _short(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
