"""zsRE as MEND's evaluation set has it (Mitchell et al. 2022, arXiv:2110.11309; De Cao et al. 2021)."""

from __future__ import annotations

from locus.readers.records import Record
from locus.readers.translation import continued, first_text, others, subject_in, translated


def zsre(record: Record) -> Record:
    """A question as it is written, its first answer, the question reworded, a wrong answer, a question far off.

    "pred" is what some model answered and "cond" repeats the rest: both are left out.
    """
    question = record.text("src")
    answer = first_text(record.fields.get("answers"))
    fields = continued(question, record.text("answers") if answer is None else answer)
    fields["paraphrases"] = [text.rstrip() for text in record.texts("rephrase") if text.strip()]
    fields["alternatives"] = others(fields, record.texts("alt"))
    near, said = record.optional_text("loc"), first_text(record.fields.get("loc_ans"))
    fields["neighbours"] = [continued(near, said)] if near and said else []
    return translated(record, fields, subject_in(question, record.optional_text("subject")))
