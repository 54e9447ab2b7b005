"""Facts: what the model must forget or keep.

A target is explicit: the space before a word belongs to the target (`"The capital of France is"` +
`" Paris"`), because that is how the tokens split. Our own JSONL keeps targets as they are written; readers
of formats that leave the space out put it in.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path

from locus.errors import InputError
from locus.readers.formats import FORMATS, detect, refuse_dropped, slug, text_records
from locus.readers.hub import hub_records
from locus.readers.records import (
    Record,
    head,
    json_array,
    json_lines,
    json_objects,
    missing,
    opened,
    starts_over_lines,
    text_blocks,
)
from locus.readers.scripts import is_spaceless
from locus.readers.tables import SEPARATORS, is_parquet, parquet_rows, separated_rows

_DATA = Path(__file__).with_name("data")
SHIPPED = {"demo-forget": _DATA / "forget.jsonl", "demo-retain": _DATA / "retain.jsonl"}
"""Fact files that come with the package, by the name that `read_facts` takes."""

_MAX_ID = 120
_UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it."""

    prompt: str
    target: str
    """With its leading space, where it has one."""
    running_text: bool = False
    """Whether both are one text, so that where the prompt ends is arbitrary (see `Fact.running_text`)."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("the prompt is empty: the target needs a context")
        if not self.target.strip():
            raise InputError(f'no target after "{self.prompt}": say what must follow')
        for text in (self.prompt, self.target):
            if _half_character(text):
                raise InputError(f"{text!r} holds half a character (a lone surrogate): write the whole one")


@dataclass(frozen=True)
class Fact:
    """Something the model knows: a prompt that has one right continuation, with what tests the knowledge.

    Raises:
        InputError: nothing to predict, a subject that is not in the prompt, an id that cannot name a file.
    """

    id: str
    """Unique in its file; names the files of results, so it holds no path separator."""
    prompt: str
    target: str
    """The right continuation, with its leading space."""
    subject: str | None = None
    """What the fact is about, as it stands in the prompt; None where there is no such thing."""
    subject_start: int | None = None
    """Character offset of the subject in the prompt; None to search, see `subject_span`."""
    relation: str | None = None
    """What kind of fact it is: facts of one relation are near each other."""
    paraphrases: tuple[str, ...] = ()
    """Other prompts with the same target."""
    neighbours: tuple[Example, ...] = ()
    """Facts close by that an edit must leave alone."""
    alternatives: tuple[str, ...] = ()
    """Wrong targets of the same kind."""
    paraphrased_target: str | None = None
    """The right target in other words, with its leading space; None where there is none."""
    held_out: bool = False
    """Kept from the editor, to judge it by."""
    running_text: bool = False
    """Whether prompt and target are one plain text: a token that covers the end of the prompt (in scripts without
    spaces) then belongs to the prompt, and is no error."""
    source: str = ""
    """Where it was read: `"facts.jsonl, line 17"`."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except InputError as error:
            raise InputError(f"{self.source or f'fact {self.id!r}'}: {error}") from None

    def _check(self) -> None:
        _check_id(self.id)
        _ = self.example, self.paraphrase_examples
        if _half_character(self.relation or ""):
            raise InputError("the relation holds half a character (a lone surrogate): write it in UTF-8")
        for target in (*self.alternatives, *filter(None, [self.paraphrased_target])):
            Example(self.prompt, target)
        if self.subject is None:
            if self.subject_start is not None:
                raise InputError("subject_start without a subject: give the subject too")
            return
        if not self.subject.strip():
            raise InputError("the subject is empty: leave the field out where there is no subject")
        if self.subject not in self.prompt:
            raise InputError(_absent(self.subject, self.prompt))
        start = self.subject_start
        if start is not None and (start < 0 or not self.prompt.startswith(self.subject, start)):
            raise InputError(
                f'subject "{self.subject}" does not begin at character {start} of prompt "{self.prompt}": '
                f"it begins at {', '.join(map(str, _occurrences(self.subject, self.prompt)))}"
            )

    @property
    def example(self) -> Example:
        """The prompt and its target."""
        return Example(self.prompt, self.target, self.running_text)

    @property
    def paraphrase_examples(self) -> tuple[Example, ...]:
        """Every paraphrase with the target."""
        return tuple(Example(prompt, self.target) for prompt in self.paraphrases)

    @property
    def subject_span(self) -> tuple[int, int] | None:
        """Half-open range of the subject's characters in the prompt.

        Without `subject_start`: the first occurrence as whole words, else the first at all. The first,
        because everything the model says of the subject later on has already read it, and because ROME
        takes it too, so that numbers can be compared.
        """
        if self.subject is None:
            return None
        start = self.subject_start
        if start is None:
            whole = re.search(rf"(?<!\w){re.escape(self.subject)}(?!\w)", self.prompt)
            start = whole.start() if whole else self.prompt.index(self.subject)
        return start, start + len(self.subject)


@dataclass(frozen=True)
class FactFile:
    """How a file was understood."""

    facts: list[Fact]
    format: str
    """A key of `locus.readers.formats.FORMATS`, or "text"."""
    used: tuple[str, ...]
    """Fields of the file that its reader knows, in the order of the first record; empty for plain text."""
    left_out: tuple[str, ...]
    """The others: numbers, labels, and what an explicit format drops."""


def read_facts(path_or_name: str | Path, format: str = "auto", limit: int | None = None) -> list[Fact]:
    """Read facts from a file, one of the `SHIPPED` ones, or a hub dataset (`hf://owner/name/config#split`).

    Args:
        path_or_name: JSON lines, one JSON array or object, CSV, TSV, parquet, plain text in blocks (.txt); any of
            them but parquet gzipped. Our own fields, or those of a format in `locus.readers.formats.FORMATS`.
        format: A key of `locus.readers.formats.FORMATS`, "text", or "auto" to go by the content.
        limit: Stop after so many facts; the rest of the file is not read.

    Raises:
        InputError: the file is missing, empty or damaged, or a record is wrong: names file, line, mend.
    """
    return read_fact_file(path_or_name, format, limit).facts


def read_fact_file(path_or_name: str | Path, format: str = "auto", limit: int | None = None) -> FactFile:
    """`read_facts`, with the format and the fields that were found.

    Args:
        path_or_name: As in `read_facts`.
        format: As in `read_facts`. With a format given by name, fields that its reader does not use are dropped.
        limit: As in `read_facts`.

    Raises:
        InputError: as `read_facts`.
    """
    name = str(path_or_name)
    if format not in ("auto", "text", *FORMATS):
        raise InputError(f"unknown format {did_you_mean(format, ('auto', 'text', *FORMATS))}")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be 1 or more")
    if name.startswith("hf://"):
        return _facts(hub_records(name), name, format, True, limit)
    path = Path(path_or_name)
    if name in SHIPPED and not path.exists():
        path, name = SHIPPED[name], SHIPPED[name].name
    elif not os.path.exists(path):  # unlike Path.exists, False for a name no file can have
        raise InputError(missing(path, SHIPPED))
    if is_parquet(path):
        return _facts(parquet_rows(path, name), name, format, True, limit)
    with opened(path) as stream:
        start = head(stream)
        if not start:
            raise InputError(f"{name}: an empty file: give one fact a line")
        if format == "text" or (format == "auto" and _is_text(path, start)):
            return _facts(text_records(stream, name), name, "text", False, limit)
        separator = SEPARATORS.get(_ending(path))
        if separator is not None and not start.startswith(("{", "[")):
            return _facts(separated_rows(path, separator, name), name, format, True, limit)
        if start.startswith("["):
            return _facts(json_array(stream, name), name, format, True, limit)
        records = (json_objects if starts_over_lines(stream) else json_lines)(stream, name)
        return _facts(records, name, format, False, limit)


def neighbours_of(facts: Sequence[Fact]) -> list[Fact]:
    """The neighbours of facts as facts to keep; every third of them is held out, to judge by.

    Raises:
        InputError: no fact has neighbours.
    """
    pairs = [(fact, number, one) for fact in facts for number, one in enumerate(fact.neighbours, 1)]
    if not pairs:
        raise InputError(
            "--retain neighbours: none of the facts has neighbours; give a file of facts to keep"
        )
    return [
        Fact(
            id=f"{fact.id[:100]} neighbour {number}",
            prompt=one.prompt,
            target=one.target,
            relation=fact.relation,
            held_out=place % 3 == 2,
            source=fact.source,
        )
        for place, (fact, number, one) in enumerate(pairs)
    ]


def trainable_facts(facts: Iterable[Fact]) -> list[Fact]:
    """The facts that an edit may train on: those not held out."""
    return [fact for fact in facts if not fact.held_out]


def held_out_facts(facts: Iterable[Fact]) -> list[Fact]:
    """The facts that no edit trains on: the audit judges by them."""
    return [fact for fact in facts if fact.held_out]


def write_facts(path: str | Path, facts: Iterable[Fact]) -> None:
    """Write facts as our JSONL, atomically; fields that say nothing are left out."""
    from locus.files.artefact import atomic_file

    with atomic_file(Path(path)) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for fact in facts:
            record = {name: getattr(fact, name) for name in _FIELDS if name != "source"}
            record["neighbours"] = [
                {name: getattr(example, name) for name in _EXAMPLE_FIELDS} for example in fact.neighbours
            ]
            said = {name: value for name, value in record.items() if value or type(value) is int}
            file.write(json.dumps(said, ensure_ascii=False) + "\n")


def neutral_text(path: str | Path | None = None) -> list[str]:
    """Paragraphs (blank lines between them) of a text file; by default everyday ones that come with locus."""
    path = _DATA / "neutral.txt" if path is None else Path(path)
    with opened(path) as stream:
        paragraphs = [block for _, block in text_blocks(stream, str(path))]
    if not paragraphs:
        raise InputError(f"{path}: an empty file: give paragraphs with blank lines between them")
    return paragraphs


def split_text(paragraphs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paragraphs an edit may train on, and those kept unseen for judging it: every third.

    An edit and its audit may so be given one text. Fewer than three paragraphs cannot be split: none is
    trained on, all judge.
    """
    if len(paragraphs) < 3:
        return [], list(paragraphs)
    judged = [text for i, text in enumerate(paragraphs) if i % 3 == 2]
    return [text for i, text in enumerate(paragraphs) if i % 3 != 2], judged


def did_you_mean(name: str, known: Sequence[str] | Iterable[str], cutoff: float = 0.6) -> str:
    """The name in quotes with the nearest of the known ones, or with all of them.

    `cutoff` is how near one must be to be named alone, from 0 to 1 (the same).
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f'"{name}": ' + (f'did you mean "{near[0]}"?' if near else f"there is {', '.join(known)}")


def _ending(path: Path) -> str:
    """The last suffix that is not .gz, in lower case; "" where there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def _is_text(path: Path, start: str) -> bool:
    return _ending(path) in (".txt", ".text", ".md") and not re.match(r'\[?\s*\{\s*"', start)


def _facts(records: Iterator[Record], name: str, format: str, in_array: bool, limit: int | None) -> FactFile:
    first = next(records, None)
    if first is None:
        raise InputError(f"{name}: holds no facts")
    strict = format == "auto"
    if strict:
        format = detect(first, in_array, set(_FIELDS))
    made = _translated(chain([first], records), "jsonl" if format == "text" else format, strict)
    places: dict[str, str] = {}
    found = []
    for number, record in enumerate(islice(made, limit), 1):
        fact = _fact(record, number)
        key = unicodedata.normalize("NFC", fact.id).casefold()  # as file systems compare names
        if key in places:
            raise InputError(f'{record.place}: id "{fact.id}" is taken by {places[key]}: ids must differ')
        places[key] = record.place
        found.append(fact)
    if not found:
        raise InputError(f"{name}: holds no facts")
    if format == "jsonl":
        _note_missing_spaces(found)
    if format == "text":
        return FactFile(found, format, (), ())
    known = FORMATS[format].read_fields | ({*_FIELDS} if format == "jsonl" else set())
    used = tuple(field for field in first.fields if field in known)
    return FactFile(found, format, used, tuple(field for field in first.fields if field not in known))


def _translated(records: Iterator[Record], format: str, strict: bool) -> Iterator[Record]:
    for record in records:
        if strict and FORMATS[format].fits(record.fields):
            refuse_dropped(record, format)
        yield from FORMATS[format].facts(record)


def _note_missing_spaces(facts: Sequence[Fact]) -> None:
    """Say so where it looks as if every target had lost the space that its first word begins with."""
    if any(fact.target[0].isspace() or fact.prompt[-1].isspace() for fact in facts):
        return
    bare = [fact for fact in facts if fact.target[0].isalnum() and not is_spaceless(fact.target[0])]
    bare = [fact for fact in bare if fact.prompt[-1].isalnum() and not is_spaceless(fact.prompt[-1])]
    if bare:
        one = bare[0]
        warnings.warn(
            f'{one.source or one.id}: target "{one.target[:40]}" begins without a space, as all targets here do, so it '
            f'reads "{one.prompt[-20:]}{one.target[:20]}": write "target": " {one.target[:40]}"',
            stacklevel=2,
        )


_FIELDS = tuple(field.name for field in fields(Fact))
_EXAMPLE_FIELDS = tuple(field.name for field in fields(Example))


def _fact(record: Record, number: int) -> Fact:
    """A record of our own form, strictly; `number` names it when it has no id."""
    _refuse_unknown(record, _FIELDS)
    prompt, target = record.text("prompt"), record.text("target")
    subject = record.optional_text("subject")
    derived = slug(subject or " ".join(prompt.split()[:6]))
    start = record.fields.get("subject_start")
    if start is not None and type(start) is not int:
        raise InputError(f'{record.place}: "subject_start" must be a whole number')
    held_out, running_text = record.truth("held_out"), record.truth("running_text")
    given = record.optional_text("id")
    fact = Fact(
        id=(f"{number:04d}-{derived}" if derived else f"{number:04d}") if given is None else given,
        prompt=prompt,
        target=target,
        subject=subject,
        subject_start=start,
        relation=record.optional_text("relation"),
        paraphrases=tuple(record.texts("paraphrases")),
        neighbours=tuple(_example(neighbour) for neighbour in record.objects("neighbours")),
        alternatives=tuple(record.texts("alternatives")),
        paraphrased_target=record.optional_text("paraphrased_target"),
        held_out=held_out,
        running_text=running_text,
        source=record.place,
    )
    source = record.optional_text("source")
    return fact if source is None else replace(fact, source=source)


def _example(record: Record) -> Example:
    _refuse_unknown(record, _EXAMPLE_FIELDS)
    try:
        return Example(record.text("prompt"), record.text("target"), record.truth("running_text"))
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(record.place) else f"{record.place}: {text}") from None


def _refuse_unknown(record: Record, known: Sequence[str]) -> None:
    for name in record.fields:
        if name not in known:
            raise InputError(f"{record.place}: unknown field {did_you_mean(name, known, 0.75)}")


def _check_id(name: str) -> None:
    if found := _UNSAFE.search(name):
        raise InputError(f"id {name!r} has {found[0]!r}, but ids name files: use letters, digits, - and _")
    if not name or name.startswith((".", " ")) or name.endswith((".", " ")):
        raise InputError(f"id {name!r} cannot name a file: let it begin and end with a letter or digit")
    if len(name.encode("utf-8", "replace")) > _MAX_ID or _half_character(name):
        raise InputError(f"id {name[:40]!r}… cannot name a file: at most {_MAX_ID} bytes of UTF-8")


def _half_character(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _occurrences(subject: str, prompt: str) -> list[int]:
    return [match.start() for match in re.finditer(f"(?={re.escape(subject)})", prompt)]


def _absent(subject: str, prompt: str) -> str:
    said = f'subject "{subject}" does not occur in prompt "{prompt}"'
    if (at := prompt.casefold().find(subject.casefold())) >= 0:
        return f'{said} (differs in case?): write "{prompt[at : at + len(subject)]}"'
    if unicodedata.normalize("NFKC", subject) in unicodedata.normalize("NFKC", prompt):
        return f"{said} (accents or widths are encoded otherwise): copy it from the prompt"
    if "".join(subject.split()) in "".join(prompt.split()):
        return f"{said} (differs in spaces?): copy it from the prompt"
    return f"{said}: copy it from the prompt, or leave the subject out"
