"""Multiple choice: the answer's text is the target, every other option an alternative; the letters are left out.

MMLU, MMLU-Pro, WMDP, RACE, ARC, and tables with the options in columns A to D.
"""

from __future__ import annotations

from locus.errors import InputError
from locus.readers.records import Record
from locus.readers.scripts import answer_to
from locus.readers.translation import asked, others, parse_json_cell, translated

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ANSWERS = ("answer", "answerKey", "answer_index", "label")


def multiple_choice(record: Record) -> Record:
    """A question with its options; an article that it is asked about stands before it.

    The right option is given by number, letter or text; where two fields give it, they must agree.
    """
    question = record.text("question_stem" if record.fields.get("question_stem") is not None else "question")
    options, labels = _options(record)
    given = [record.fields[name] for name in _ANSWERS if record.fields.get(name) is not None]
    if not given:
        raise InputError(f'{record.place}: no "answer": say which option is right')
    places = {_place(record, one, options, labels) for one in given}
    if len(places) > 1:
        raise InputError(f"{record.place}: its answer fields name different options: {given}")
    right = options[places.pop()]
    before = next(filter(None, map(record.optional_text, ("article", "passage", "context"))), "")
    fields = asked(question, right, before)
    fields["alternatives"] = [
        text for text in others(fields, options, question) if text != answer_to(question, right)
    ]
    relation = next(filter(None, map(record.optional_text, ("subject", "category"))), None)
    return translated(record, fields, relation=relation)


def _options(record: Record) -> tuple[list[str], list[str]]:
    """The options and what each is called."""
    if isinstance(record.fields.get("A"), str):
        letters = [letter for letter in LETTERS if record.fields.get(letter) is not None]
        return [record.text(letter) for letter in letters], letters
    name = "choices" if record.fields.get("choices") is not None else "options"
    value = parse_json_cell(record.fields.get(name))
    labels: object = None
    if isinstance(value, dict):  # ARC: {"text": [...], "label": [...]}, or letter -> option
        labels = value.get("label", list(value))
        value = value.get("text", list(value.values()))
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(value) < 2:
        raise InputError(f'{record.place}: "{name}" must be a list of two texts or more')
    if not isinstance(labels, list) or len(labels) != len(value):
        labels = list(LETTERS[: len(value)])
    return value, [str(label) for label in labels]


def _place(record: Record, given: object, options: list[str], labels: list[str]) -> int:
    """Index of the right option."""
    if isinstance(given, int) and not isinstance(given, bool):
        if 0 <= given < len(options):
            return given
    elif isinstance(given, str):
        if given.strip() in labels:
            return labels.index(given.strip())
        if given in options:
            return options.index(given)
        if given.strip().isdecimal() and int(given) < len(options):
            return int(given)
    raise InputError(f"{record.place}: the answer {given!r} is none of the {len(options)} options")
