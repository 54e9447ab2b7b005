"""RippleEdits (Cohen et al. 2024, arXiv:2307.12976): a fact as a whole sentence, and what it touches."""

from __future__ import annotations

from collections.abc import Iterator

from locus.errors import InputError
from locus.readers.records import Record
from locus.readers.translation import continued, first_text, others, subject_in, translated

_NEAR = ("Relation_Specificity", "Forgetfulness")
"""Sets of queries that the edit must leave as they are."""
_VERBS = (" is ", " are ", " was ", " were ")


def ripple_edits(record: Record) -> Record:
    """The original fact (else the edit itself) as prompt and target; queries on other relations are neighbours.

    The sentences are made from a pattern, "The name of the RELATION of SUBJECT is TARGET.", and are taken
    apart at its verb. The logical and compositional sets follow from the edit's new target and are left out.
    """
    edit = record.object("edit")
    new = _parts(edit)
    original = edit.fields.get("original_fact")
    prompt, target = _parts(edit.object("original_fact")) if isinstance(original, dict) else new
    fields = continued(prompt, target)
    fields["alternatives"] = others(fields, [new[1]])
    near = [query for name in _NEAR for query in _queries(record, name)]
    fields["neighbours"] = [continued(*query) for query in near]
    subject = subject_in(prompt, _subject(prompt, [text for text, _ in _queries(record, _NEAR[0])]))
    relation = edit.optional_text("relation")
    return translated(record, fields, subject, relation=relation)


def _parts(statement: Record) -> tuple[str, str]:
    text = statement.text("prompt").strip().removesuffix(".")
    at, verb = max((text.rfind(verb), verb) for verb in _VERBS)
    if at <= 0 or not text[at + len(verb) :].strip():
        raise InputError(f'{statement.place}: "prompt" is no sentence of the form "The … of … is …."')
    return text[: at + len(verb) - 1], text[at + len(verb) :]


def _queries(record: Record, name: str) -> Iterator[tuple[str, str]]:
    """Prompt and first answer of every query of a set that has an answer."""
    for test in record.objects(name):
        for query in test.objects("test_queries"):
            answers = [one.fields.get("value") for one in query.objects("answers")]
            if (answer := first_text(answers)) is not None and (text := query.optional_text("prompt")):
                yield text, answer


def _subject(prompt: str, near: list[str]) -> str | None:
    """What follows "of" where all queries on the same subject end alike; None where there are too few."""
    texts = [text.rstrip() for text in (prompt, *near)]
    if len(texts) < 3:
        return None
    shared = texts[0]
    for text in texts[1:]:
        n = next((i for i in range(min(len(shared), len(text))) if shared[-1 - i] != text[-1 - i]), None)
        shared = shared[len(shared) - min(len(shared), len(text) if n is None else n) :]
    _, _, rest = f" {shared}".partition(" of ")
    rest = next((rest.removesuffix(verb.rstrip()) for verb in _VERBS if rest.endswith(verb.rstrip())), "")
    return rest or None
