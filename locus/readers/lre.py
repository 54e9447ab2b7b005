"""Relations of the linear relational embeddings (Hernandez et al. 2024, arXiv:2308.09124): templates × samples."""

from __future__ import annotations

from collections.abc import Iterator

from locus.errors import InputError
from locus.readers.records import Record
from locus.readers.translation import continued, translated


def lre(record: Record) -> Iterator[Record]:
    """One fact for each sample: the first template is the prompt, every other one a paraphrase."""
    templates = list(dict.fromkeys([*record.texts("prompt_templates"), *record.texts("prompt_templates_zs")]))
    if not templates:
        raise InputError(f'{record.place}: no template in "prompt_templates"')
    if wrong := next((text for text in templates if text.count("{}") != 1), None):
        raise InputError(f'{record.place}: template "{wrong}" needs one {{}} where the subject goes')
    relation = record.optional_text("name")
    for sample in record.objects("samples"):
        subject, said = sample.text("subject"), sample.text("object")
        first, *more = (text.replace("{}", subject) for text in templates)
        fields = continued(first, said)
        fields["subject_start"] = templates[0].index("{}")
        fields["paraphrases"] = [text.rstrip() for text in more]
        yield translated(sample, fields, subject, relation=relation)
