"""CounterFact in full, and as EasyEdit and KnowEdit write it."""

from __future__ import annotations

from locus.errors import InputError
from locus.readers.records import Record
from locus.readers.translation import continued, first_text, others, subject_in, translated


def counterfact(record: Record) -> Record:
    """CounterFact in full: the true target is the fact, the new one an alternative (Meng et al. 2022).

    Neighbourhood prompts ask for the same target of other subjects.
    """
    rewrite = record.object("requested_rewrite")
    fields = rewritten(rewrite)
    true = rewrite.object("target_true").text("str")
    fields["paraphrases"] = [text.rstrip() for text in record.texts("paraphrase_prompts")]
    fields["neighbours"] = [continued(text, true) for text in record.texts("neighborhood_prompts")]
    named = Record(record.place, {**record.fields, "relation_id": rewrite.fields.get("relation_id")})
    return translated(named, fields, rewrite.text("subject"), record.fields.get("case_id"))


def rewritten(rewrite: Record) -> dict[str, object]:
    """Prompt, target, subject's start and alternatives of one rewrite, as CounterFact and MQuAKE have it."""
    subject, template = rewrite.text("subject"), rewrite.text("prompt")
    before, mark, after = template.partition("{}")
    if not mark:
        raise InputError(f'{rewrite.place}: "prompt" has no {{}} where the subject goes')
    fields = continued(before + subject + after, rewrite.object("target_true").text("str"))
    fields["subject_start"] = len(before)
    if "target_new" in rewrite.fields:
        fields["alternatives"] = others(fields, [rewrite.object("target_new").text("str")])
    return fields


def easyedit(record: Record) -> Record:
    """EasyEdit's CounterFact and KnowEdit (Zhang et al. 2024, arXiv:2401.01286): flat, with locality.

    The target is the ground truth where there is one (the new target is then an alternative), else the new
    target: wiki_recent has nothing else. What "portability" asks follows from the new target, and is left out.
    """
    prompt, new = record.text("prompt"), first_text(record.fields.get("target_new"))
    true = first_text(record.fields.get("ground_truth")) or new
    if true is None:
        raise InputError(f'{record.place}: no "ground_truth" and no "target_new": say what must follow')
    fields = continued(prompt, true)
    fields["paraphrases"] = [
        text.rstrip()
        for name in ("rephrase_prompt", "rephrase")
        for text in record.texts(name)
        if text.strip()
    ]
    fields["neighbours"] = _locality(record)
    fields["alternatives"] = others(fields, [new] if new else [])
    return translated(
        record, fields, subject_in(prompt, record.optional_text("subject")), record.fields.get("case_id")
    )


def _locality(record: Record) -> list[dict[str, object]]:
    """Prompts near by with what they must go on to say; those without an answer ask nothing."""
    found = list(
        zip(record.texts("locality_prompt"), _each(record.fields.get("locality_ground_truth")), strict=False)
    )
    locality = record.fields.get("locality")
    for kind, asked in locality.items() if isinstance(locality, dict) else ():
        for one in Record(f"{record.place}, locality", {kind: asked}).objects(kind) if asked else ():
            found.append((first_text(one.fields.get("prompt")) or "", one.fields.get("ground_truth")))
    return [
        continued(text, said)
        for text, value in found
        if text.strip() and (said := first_text(value)) is not None
    ]


def _each(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
