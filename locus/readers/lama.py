"""LAMA and ParaRel: a pattern with [X] and [Y] for each relation, and pairs that fill it.

LAMA's rows on the hub hold both; its files, and ParaRel's, keep the patterns in a file of their own, which is looked
for where the archives have it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from locus.errors import InputError
from locus.readers.records import Record
from locus.readers.translation import continued, translated


def lama(record: Record) -> Record:
    """A pair in its relation's patterns (Petroni et al. 2019, arXiv:1909.01066; Elazar et al. 2021, arXiv:2102.01017).

    The first pattern that ends with its [Y] is the prompt, every other such one a paraphrase; a pattern that goes on
    after [Y] is none that a causal model could complete.
    """
    subject, said = record.text("sub_label"), record.text("obj_label")
    relation = record.optional_text("predicate_id")
    template = record.optional_text("template")
    patterns = [template] if template else _patterns(record, relation)
    usable = [before for text in patterns if (before := _before_y(text)) is not None]
    if not usable:
        raise InputError(f'{record.place}: no pattern of its relation ends with [Y]: "{patterns[0]}"')
    first, *more = usable
    fields = continued(first.replace("[X]", subject), said)
    fields["subject_start"] = first.index("[X]")
    fields["paraphrases"] = list(dict.fromkeys(text.replace("[X]", subject).rstrip() for text in more))
    return translated(record, fields, subject, relation=relation or _stem(record))


def _before_y(pattern: str) -> str | None:
    before, mark, after = pattern.partition("[Y]")
    ends = mark and not after.strip(" .,;:!?\"'")
    return before if ends and before.count("[X]") == 1 else None


def _stem(record: Record) -> str:
    return _path(record).name.split(".")[0]


def _path(record: Record) -> Path:
    return Path(record.place.rpartition(", ")[0])


def _patterns(record: Record, relation: str | None) -> list[str]:
    path = _path(record)
    stem = _stem(record)
    for folder in (path.parent, path.parent.parent):
        for name in (folder / "graphs_json", folder / "pattern_data" / "graphs_json"):
            if found := list(_read(name / f"{stem}.jsonl", "pattern", None)):
                return found
        if found := list(_read(folder / "relations.jsonl", "template", relation or stem)):
            return found
    raise InputError(
        f"{record.place}: pairs without a pattern: put LAMA's relations.jsonl beside or above the file, or ParaRel's "
        f"pattern_data/graphs_json/{stem}.jsonl"
    )


def _read(path: Path, field: str, relation: str | None) -> Iterator[str]:
    for one in _objects(path):
        if (relation is None or one.get("relation") == relation) and isinstance(one.get(field), str):
            yield one[field]


@functools.lru_cache(maxsize=8)
def _objects(path: Path) -> tuple[dict[str, str], ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: patterns that cannot be read ({error}); fetch the file again") from None
    return tuple(one for one in found if isinstance(one, dict))
