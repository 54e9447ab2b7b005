"""MQuAKE (Zhong et al. 2023, arXiv:2305.14795): chains of facts, and questions that need the whole chain."""

from __future__ import annotations

from collections.abc import Iterator

from locus.readers.counterfact import rewritten
from locus.readers.records import Record
from locus.readers.translation import asked, others, slug, translated


def mquake(record: Record) -> Iterator[Record]:
    """One fact for each rewrite of a case, and one, held out, for its question of several hops.

    The true target is the fact and the new one an alternative. The rewrite's own question is a paraphrase; the
    three wordings of the question of several hops are one prompt and two paraphrases.
    """
    case = record.fields.get("case_id")
    number = str(case) if isinstance(case, int) else None
    for place, rewrite in enumerate(record.objects("requested_rewrite"), 1):
        fields = rewritten(rewrite)
        if (question := rewrite.optional_text("question")) is not None:
            fields["paraphrases"] = [asked(question, "")["prompt"]]
        subject = rewrite.text("subject")
        if number is not None:
            fields["id"] = "-".join(filter(None, (number, str(place), slug(subject))))
        yield translated(rewrite, fields, subject)
    questions, answer = record.texts("questions"), record.optional_text("answer")
    if questions and answer:
        first, *more = questions
        fields = asked(first, answer) | {"held_out": True, "relation": "several hops"}
        fields["paraphrases"] = [asked(text, answer)["prompt"] for text in more]
        fields["alternatives"] = others(fields, record.texts("new_answer"), first)
        if number is not None:
            fields["id"] = f"{number}-hops"
        yield translated(record, fields)
