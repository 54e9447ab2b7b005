"""Other people's fact files, translated record by record into ours (the fields of `locus.fact.Fact`).

A new format is one function and one line in `FORMATS`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from io import BufferedReader

from locus.errors import InputError
from locus.readers.records import Record, text_blocks

TOFU_TEMPLATE = "Question: {}\nAnswer:"
"""How a question becomes a prompt."""

BLOCK_WORDS = 200
"""A block of plain text longer than this is cut, so that it fits a context of 512 tokens."""


def known_1000(record: Record) -> Record:
    """ROME's known_1000: subject, attribute, template, prompt (Meng et al. 2022, arXiv:2202.05262)."""
    subject, prompt = record.text("subject"), record.text("prompt")
    template = record.optional_text("template") or ""
    start = template.find("{}")
    fields = _spaced(prompt, record.text("attribute"))
    if start >= 0 and prompt.startswith(subject, start):
        fields["subject_start"] = start
    return _translated(record, fields, subject=subject, number=record.fields.get("known_id"))


def counterfact(record: Record) -> Record:
    """CounterFact in full: the true target is the fact, the new one an alternative (Meng et al. 2022).

    Neighbourhood prompts ask for the same target of other subjects.
    """
    rewrite = record.object("requested_rewrite")
    subject, template = rewrite.text("subject"), rewrite.text("prompt")
    true = rewrite.object("target_true").text("str")
    before, mark, after = template.partition("{}")
    if not mark:
        raise InputError(f'{rewrite.place}: "prompt" has no {{}} where the subject goes')
    fields = _spaced(before + subject + after, true)
    fields["subject_start"] = len(before)
    fields["paraphrases"] = [text.rstrip() for text in record.texts("paraphrase_prompts")]
    fields["neighbours"] = [_spaced(text, true) for text in record.texts("neighborhood_prompts")]
    if "target_new" in rewrite.fields:
        fields["alternatives"] = [_space(rewrite.object("target_new").text("str"))]
    named = Record(record.place, {**record.fields, "relation_id": rewrite.fields.get("relation_id")})
    return _translated(named, fields, subject=subject, number=record.fields.get("case_id"))


def tofu(record: Record) -> Record:
    """TOFU's questions and answers, through `TOFU_TEMPLATE` (Maini et al. 2024, arXiv:2401.06121).

    Perturbed answers (else the options that are not the answer) become the alternatives, the paraphrased
    answer the paraphrased target. There is no subject.
    """
    answer = record.text("answer")
    wrong = record.texts("perturbed_answer") or [
        text
        for name in ("option1", "option2", "option3", "option4")
        if (text := record.optional_text(name)) is not None and text != answer
    ]
    fields = _spaced(TOFU_TEMPLATE.format(record.text("question")), answer)
    fields["paraphrases"] = [TOFU_TEMPLATE.format(text) for text in record.texts("paraphrased_question")]
    fields["alternatives"] = [_space(text) for text in wrong]
    if (said := record.optional_text("paraphrased_answer")) is not None:
        fields["paraphrased_target"] = _space(said)
    return _translated(record, fields)


def triples(record: Record) -> Record:
    """Bare subject, prompt, target; a relation_id is kept, everything else is dropped."""
    fields = _spaced(record.text("prompt"), record.text("target"))
    return _translated(record, fields, subject=record.text("subject"))


def _ours(record: Record) -> Record:
    return record


FORMATS: dict[str, Callable[[Record], Record]] = {
    "jsonl": _ours,
    "known_1000": known_1000,
    "counterfact": counterfact,
    "tofu": tofu,
    "triples": triples,
}
"""How a JSON record of each format is translated; "text" has no records, see `text_records`."""


def detect(record: Record, in_array: bool, ours: set[str]) -> str:
    """The format of a first record, by its fields; `ours` are the fields that our own format has."""
    found, triple = set(record.fields), {"subject", "prompt", "target"}
    if "requested_rewrite" in found:
        return "counterfact"
    if {"question", "answer"} <= found:
        return "tofu"
    if {"subject", "prompt", "attribute"} <= found:
        return "known_1000"
    if in_array and triple <= found and not (found - triple) & ours:
        return "triples"
    return "jsonl"


def text_records(stream: BufferedReader, name: str) -> Iterator[Record]:
    """Blocks of plain text (blank lines between them): the first word is the prompt, the rest the target.

    A block of more than `BLOCK_WORDS` words becomes several; one of a single word has nothing to predict
    and is left out.
    """
    for line, block in text_blocks(stream, name):
        for piece in _cut(block, BLOCK_WORDS):
            word, *rest = piece.split(maxsplit=1)
            if rest:
                yield Record(f"{name}, line {line}", {"prompt": word, "target": piece[len(word) :]})


def slug(text: str) -> str:
    """The text as part of a file name: ASCII letters and digits with hyphens between, 40 at most."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub("[^a-z0-9]+", "-", plain)[:40].strip("-")


def _cut(block: str, n_words: int) -> Iterator[str]:
    start, words = 0, 0
    for at in range(1, len(block)):
        if block[at].isspace() and not block[at - 1].isspace():
            words += 1
            if words == n_words:
                yield block[start:at]
                start, words = at, 0
                while block[start].isspace():
                    start += 1
    yield block[start:]


def _space(target: str) -> str:
    return target if target[:1].isspace() or not target else " " + target


def _spaced(prompt: str, target: str) -> dict[str, object]:
    """A space at the prompt's end, or none at all, becomes the space at the target's start."""
    return {"prompt": prompt.rstrip(" "), "target": _space(target)}


def _translated(
    record: Record, fields: dict[str, object], subject: str | None = None, number: object = None
) -> Record:
    extra: dict[str, object] = {"subject": subject, "relation": record.optional_text("relation_id")}
    if isinstance(number, int):
        extra["id"] = "-".join(filter(None, (str(number), slug(subject or ""))))
    return Record(record.place, fields | {name: value for name, value in extra.items() if value is not None})
