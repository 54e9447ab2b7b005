"""WMDP (Li et al. 2024, arXiv:2403.03218): multiple-choice questions on hazardous knowledge, by letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locus.audit.attacks.choice import OPTION_LETTERS, by_letter
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.state import State
from locus.audit.suites.source import ENDINGS, HUB, BenchmarkFolder, read_records
from locus.errors import InputError
from locus.fact import Fact

SUBJECTS = ("wmdp-bio", "wmdp-chem", "wmdp-cyber")
PREFACE = "The following are multiple choice questions (with answers).\n\n"


@dataclass(frozen=True)
class Wmdp:
    """Questions with four choices and the index of the right one."""

    records: Sequence[Mapping[str, Any]]
    retain: Sequence[Fact] = ()

    figures = ("wmdp.accuracy",)

    @property
    def facts(self) -> list[Fact]:
        """The questions as facts, the other choices as alternatives."""
        return [_fact(i, r) for i, r in enumerate(self.records)]

    def run(self, state: State, context: Context) -> FigureValues:
        """Share of questions whose right letter is likeliest, zero-shot."""
        asked = [(_text(r), int(r["answer"]), len(r["choices"])) for r in self.records]
        with state.active() as model:
            scores = by_letter(model, asked, context.max_tokens)
        ids = tuple(str(i) for i in range(len(scores)))
        return FigureValues({"wmdp.accuracy": Items(ids, torch.tensor(scores))})


def read_wmdp(place: str | Path, limit: int | None = None) -> Wmdp:
    """Read a WMDP file, every .json and .jsonl of a folder, or hf://cais/wmdp (all three subjects) or one of its.

    Raises:
        InputError: nothing there, or a record without question, choices and the index of its answer.
    """
    needed = ("question", "choices", "answer")
    source = BenchmarkFolder(str(place))
    if source.on_hub:
        dataset, _, subject = source.place.removeprefix(HUB).partition("/")[2].partition("/")
        owner = source.place.removeprefix(HUB).partition("/")[0]
        hub = BenchmarkFolder(f"{HUB}{owner}/{dataset}")
        names = [subject] if subject else SUBJECTS
        records = [r for name in names for r in hub.read(f"{name}/test", limit, *needed)]
    else:
        path = Path(place)
        files = sorted(p for p in path.iterdir() if p.name.endswith(ENDINGS)) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{place}: no .json or .jsonl file with questions")
        records = [r for file in files for r in read_records(file, limit, *needed)]
    for i, r in enumerate(records):
        choices = r["choices"]
        if (
            not isinstance(choices, list)
            or not 2 <= len(choices) <= len(OPTION_LETTERS)
            or r["answer"] not in range(len(choices))
        ):
            raise InputError(
                f"{place}, record {i + 1}: needs 2 to {len(OPTION_LETTERS)} choices and the index of the right one"
            )
    return Wmdp(records)


def _text(record: Mapping[str, Any]) -> str:
    lines = "".join(f"{OPTION_LETTERS[i]}. {choice}\n" for i, choice in enumerate(record["choices"]))
    return f"{PREFACE}{record['question'].strip()}\n{lines}Answer:"


def _fact(i: int, record: Mapping[str, Any]) -> Fact:
    options = [f" {str(choice).strip()}" for choice in record["choices"]]
    target = options.pop(record["answer"])
    return Fact(
        id=f"question-{i}",
        prompt=f"{record['question'].strip()}\nAnswer:",
        target=target,
        alternatives=tuple(options),
    )
