"""SQuAD and what has its shape (Rajpurkar et al. 2016, arXiv:1606.05250): questions on a passage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from locus.readers.records import Record
from locus.readers.rows import trivia_qa
from locus.readers.translation import asked, first_text, subject_in, translated


def squad(record: Record) -> Iterator[Record]:
    """A flat row: the passage stands before the question, the first answer is the target.

    A question that the passage does not answer (SQuAD 2) has no target: it is left out with a note.
    """
    question, context = record.text("question"), record.text("context")
    answers = record.fields.get("answers")
    texts = (
        answers.get("text")
        if isinstance(answers, dict)
        else [one.fields.get("text") for one in record.objects("answers")]
    )
    answer = first_text(texts)
    if answer is None:
        warnings.warn(
            f"{record.place}: a question without an answer is left out, and others like it", stacklevel=2
        )
        return
    fields = asked(question, answer, context)
    title = (record.optional_text("title") or "").replace("_", " ")
    yield translated(record, fields, subject_in(question, title))


def nested(record: Record) -> Iterator[Record]:
    """A whole file of SQuAD's ("data") or TriviaQA's ("Data")."""
    for row in record.objects("Data"):
        yield trivia_qa(row)
    for title in record.objects("data"):
        for paragraph in title.objects("paragraphs"):
            for row in paragraph.objects("qas"):
                given = {"context": paragraph.text("context"), "title": title.fields.get("title")}
                yield from squad(Record(row.place, row.fields | given))
