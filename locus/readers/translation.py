"""What every reader of a public format needs: prompts and targets joined, subjects found, ids made."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

from locus.readers.records import Record
from locus.readers.scripts import answer_to, spaced

TOFU_TEMPLATE = "Question: {}\nAnswer:"
"""How a question becomes a prompt."""


def slug(text: str) -> str:
    """The text as part of a file name: ASCII letters and digits with hyphens between, 40 at most."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain)[:40].strip("-")


def continued(prompt: str, target: str) -> dict[str, object]:
    """Prompt and target of a sentence: a space at the prompt's end, or none at all, goes to the target's start."""
    prompt = prompt.rstrip(" ")
    return {"prompt": prompt, "target": spaced(prompt, target)}


def asked(question: str, answer: str, before: str = "") -> dict[str, object]:
    """Prompt and target of a question, through `TOFU_TEMPLATE`; `before` is a text that it is asked about."""
    prompt = f"{before.strip()}\n\n" * bool(before.strip()) + TOFU_TEMPLATE.format(question)
    return {"prompt": prompt, "target": answer_to(question, answer)}


def others(prompt_and_target: dict[str, object], wrong: Iterable[str], question: str = "") -> list[str]:
    """Wrong targets, each once, written as the right one is; the right one itself is left out.

    Args:
        prompt_and_target: Of `continued` or `asked`.
        wrong: As the format has them.
        question: What was asked, where it was `asked`.
    """
    prompt, target = str(prompt_and_target["prompt"]), str(prompt_and_target["target"])
    written = [
        answer_to(question, text) if question else spaced(prompt, text) for text in wrong if text.strip()
    ]
    return [text for text in dict.fromkeys(written) if text.strip() != target.strip()]


def subject_in(prompt: str, subject: str | None) -> str | None:
    """The subject as it stands in the prompt, in whatever case; None where it does not."""
    if not subject or not subject.strip():
        return None
    if subject in prompt:
        return subject
    found = re.search(re.escape(subject.strip()), prompt, re.IGNORECASE)
    return found[0] if found else None


def translated(
    record: Record,
    fields: dict[str, object],
    subject: str | None = None,
    number: object = None,
    relation: str | None = None,
) -> Record:
    """A record of ours.

    Args:
        record: The one that it was made of.
        fields: Of `locus.fact.Fact`.
        subject: As it stands in the prompt; None for none.
        number: The record's own number or name, for the id.
        relation: What kind of fact it is; by default the record's "relation_id".
    """
    kind = record.optional_text("relation_id") if relation is None else relation
    extra: dict[str, object] = {"subject": subject, "relation": kind}
    if isinstance(number, int) and not isinstance(number, bool):
        extra["id"] = "-".join(filter(None, (str(number), slug(subject or ""))))
    return Record(record.place, fields | {name: value for name, value in extra.items() if value is not None})


def first_text(value: object) -> str | None:
    """The first text in a value that is one, a list of them, or lists in lists; None where there is none."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Sequence):
        return next((text for one in value if (text := first_text(one)) is not None), None)
    return None


def parse_json_cell(value: object) -> object:
    """A list or an object that a table holds as JSON in one cell; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] + value.strip()[-1:] in ("[]", "{}"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
