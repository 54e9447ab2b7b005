"""Formats of which one row is one fact under other names."""

from __future__ import annotations

from locus.readers.records import Record
from locus.readers.scripts import answer_to, is_question
from locus.readers.translation import asked, continued, first_text, others, subject_in, translated


def known_1000(record: Record) -> Record:
    """ROME's known_1000: subject, attribute, template, prompt (Meng et al. 2022, arXiv:2202.05262)."""
    subject, prompt = record.text("subject"), record.text("prompt")
    template = record.optional_text("template") or ""
    start = template.find("{}")
    fields = continued(prompt, record.text("attribute"))
    if start >= 0 and prompt.startswith(subject, start):
        fields["subject_start"] = start
    return translated(record, fields, subject=subject, number=record.fields.get("known_id"))


def triples(record: Record) -> Record:
    """Bare subject, prompt, target; a relation_id is kept, everything else is dropped."""
    fields = continued(record.text("prompt"), record.text("target"))
    return translated(record, fields, subject=record.text("subject"))


def counterfact_tracing(record: Record) -> Record:
    """NeelNanda/counterfact-tracing: CounterFact's prompts and both targets, flat."""
    fields = continued(record.text("prompt"), record.text("target_true"))
    fields["alternatives"] = others(fields, [record.text("target_false")])
    return translated(record, fields, subject=subject_in(str(fields["prompt"]), record.text("subject")))


def popqa(record: Record) -> Record:
    """PopQA (Mallen et al. 2023, arXiv:2212.10511): a question, its object, the subject in it."""
    question = record.text("question")
    fields = asked(question, record.text("obj"))
    subject = subject_in(question, record.optional_text("subj"))
    return translated(record, fields, subject, relation=record.optional_text("prop"))


def tofu(record: Record) -> Record:
    """TOFU's questions and answers, through `TOFU_TEMPLATE` (Maini et al. 2024, arXiv:2401.06121).

    Perturbed answers (else the options that are not the answer) become the alternatives, the paraphrased
    answer the paraphrased target. There is no subject. Of several right answers (MUSE's knowmem, NQ-open) the first
    is the target.
    """
    answer = first_text(record.fields.get("answer"))
    if answer is None:
        answer = record.text("answer")
    question = record.text("question")
    wrong = record.texts("perturbed_answer") or [
        text
        for name in ("option1", "option2", "option3", "option4")
        if (text := record.optional_text(name)) is not None and text != answer
    ]
    fields = asked(question, answer)
    fields["paraphrases"] = [asked(text, answer)["prompt"] for text in record.texts("paraphrased_question")]
    fields["alternatives"] = [answer_to(question, text) for text in wrong]
    if (said := record.optional_text("paraphrased_answer")) is not None:
        fields["paraphrased_target"] = answer_to(question, said)
    return translated(record, fields)


def muse_verbatim(record: Record) -> Record:
    """MUSE's verbmem: the beginning of a passage, and how it goes on (Shi et al. 2024, arXiv:2407.06460)."""
    return translated(record, continued(record.text("prompt"), record.text("gt")))


def lume(record: Record) -> Record:
    """LUME (Ramakrishna et al. 2025, arXiv:2502.15097): input and output, of passages and of questions."""
    fields = continued(record.text("input"), record.text("output"))
    return translated(record, fields, relation=record.optional_text("task"))


def knowundo(record: Record) -> Record:
    """KnowUnDo (Tian et al. 2024, arXiv:2407.01920): a question in "text", its answer in "labels"."""
    question, answer = record.text("text"), record.text("labels")
    return translated(
        record, asked(question, answer) if is_question(question) else continued(question, answer)
    )


def completion(record: Record) -> Record:
    """A prompt and its "completion" or "response", as they are written."""
    name = "completion" if record.fields.get("completion") is not None else "response"
    prompt, said = record.text("prompt"), record.text(name)
    return translated(record, asked(prompt, said) if is_question(prompt) else continued(prompt, said))


def trivia_qa(record: Record) -> Record:
    """TriviaQA without its evidence (Joshi et al. 2017, arXiv:1705.03551): the question, its answer's value."""
    if "Question" in record.fields:
        return translated(record, asked(record.text("Question"), record.object("Answer").text("Value")))
    return translated(record, asked(record.text("question"), record.object("answer").text("value")))


def instruction(record: Record) -> Record:
    """Alpaca's form: an instruction, perhaps with an input, and the output."""
    told, given = record.text("instruction"), record.optional_text("input") or ""
    return translated(
        record, asked(f"{told.strip()}\n{given}" if given.strip() else told, record.text("output"))
    )


def rwku(record: Record) -> Record:
    """RWKU's levels and neighbours (Jin et al. 2024, arXiv:2406.10890): a query on a subject, its answer."""
    query, answer = record.text("query"), record.text("answer")
    fields = continued(query, answer) if query.rstrip().endswith(":") else asked(query, answer)
    subjects = (subject_in(query, record.optional_text(name)) for name in ("neighbor", "subject"))
    return translated(
        record, fields, next(filter(None, subjects), None), relation=record.optional_text("type")
    )
