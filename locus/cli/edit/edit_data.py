"""What an edit is given: what must go, what must stay, and neutral text, from the names on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from locus.fact import Fact
    from locus.model import Model

NEIGHBOURS, GENERATED = "neighbours", "generated"
TEXT = "text.txt"
"""Where generated text is kept, in the folder of the edit."""

Material = tuple[list["Fact"], list["Fact"], tuple[list[str], list[str]]]
"""To forget, to keep, and neutral paragraphs: to train on, unseen."""


def material(
    model: Model,
    forget: Sequence[Fact],
    retain: str | None,
    text: Path | None,
    folder: Path | None,
    seed: int,
) -> Material:
    """Read or make them.

    Args:
        model: What writes text, if text is to be generated.
        forget: What must go.
        retain: A fact file, "neighbours", or nothing.
        text: A text file, "generated", or None for the one that comes with locus.
        folder: Where generated text is kept and found again; None makes none, the shipped text stands for it.
        seed: Of the generated text.
    """
    from locus.fact import neutral_text, split_text

    kept = retained(forget, retain)
    if text == Path(GENERATED) and not text.exists():
        text = None if folder is None else _generated(model, folder / TEXT, seed)
    return list(forget), kept, split_text(neutral_text(text))


def retained(forget: Sequence[Fact], retain: str | None) -> list[Fact]:
    """What must stay: a fact file's facts, those that the forgotten ones name themselves ("neighbours"), or none."""
    from locus.fact import neighbours_of, read_facts

    if retain == NEIGHBOURS and not Path(NEIGHBOURS).exists():
        return neighbours_of(forget)
    return [] if retain is None else read_facts(retain)


def _generated(model: Model, path: Path, seed: int) -> Path:
    """The text that an earlier run made of the same model and seed, or a new one."""
    from locus.files.artefact import atomic_file, load_json, save_json
    from locus.input_digest import input_digests
    from locus.text import generated_text

    record = path.with_suffix(".json")
    made_from = input_digests(model, seed=seed)
    if path.exists() and record.exists() and load_json(record, "generated-text")["inputs"] == made_from:
        return path
    paragraphs = generated_text(model, seed=seed)
    record.unlink(missing_ok=True)  # of another text
    with atomic_file(path) as beside:
        beside.write_text("\n\n".join(paragraphs) + "\n", "utf-8")
    save_json(record, "generated-text", {"inputs": made_from})
    return path
