"""MUSE (Shi et al. 2024, arXiv:2407.06460): verbatim memory, knowledge memory, privacy leakage.

Files as the benchmark has them: verbmem/forget.json (prompt, gt), knowmem/{forget,retain}_qa.json and
_qa_icl.json (question, answer), privleak/{forget,holdout}.json (text). What is not there is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from locus import metrics
from locus.audit.attacks.generation import generate
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.state import State
from locus.audit.suites.membership import SCORES, membership_scores
from locus.audit.suites.source import BenchmarkFolder
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.model import Model
from locus.tokens import encode

STOPS = ("\n\n", "\nQuestion", "Question:")
VERBMEM_TOKENS = 128
KNOWMEM_TOKENS = 32
MIN_K = 0.4

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Muse:
    """MUSE's sets, by the name of their file without its ending; absent ones are not measured."""

    sets: Mapping[str, Records]
    facts: Sequence[Fact] = ()
    retain: Sequence[Fact] = ()

    figures = (
        "muse.verbmem_f",
        "muse.knowmem_f",
        "muse.knowmem_r",
        "muse.privacy_auc",
        "muse.privleak",
        *(f"membership.{name}" for name in SCORES),
    )

    def run(self, state: State, context: Context) -> FigureValues:
        """Measure one state; PrivLeak needs `context.never_knew`, a model retrained without the forget set."""
        items: dict[str, Items] = {}
        scalars: dict[str, float] = {}
        with state.active() as model:
            if "verbmem/forget" in self.sets and (verbatim := self._verbmem(model)) is not None:
                items["muse.verbmem_f"] = verbatim
            for group in ("forget", "retain"):
                if f"knowmem/{group}_qa" in self.sets and (known := self._knowmem(model, group)) is not None:
                    items[f"muse.knowmem_{group[0]}"] = known
            if self._has_privacy:
                reference = None if context.never_knew is None else context.never_knew.model
                scores = self._membership(model, reference)
                scalars |= {f"membership.{name}": metrics.auc(*pair) for name, pair in scores.items()}
                scalars["muse.privacy_auc"] = metrics.privacy_auc(*scores["min_k"])
        if self._has_privacy and context.never_knew is not None:
            with context.never_knew.active() as model:
                retrained = metrics.privacy_auc(*self._membership(model, None)["min_k"])
            if retrained > 0:
                scalars["muse.privleak"] = metrics.privleak(scalars["muse.privacy_auc"], retrained)
        return FigureValues(items, scalars)

    @property
    def _has_privacy(self) -> bool:
        return "privleak/forget" in self.sets and "privleak/holdout" in self.sets

    def _verbmem(self, model: Model) -> Items | None:
        records = self.sets["verbmem/forget"]
        return _rouge_items(
            model, [r["prompt"] for r in records], [[r["gt"]] for r in records], VERBMEM_TOKENS
        )

    def _knowmem(self, model: Model, group: str) -> Items | None:
        records = self.sets[f"knowmem/{group}_qa"]
        shots = self.sets.get(f"knowmem/{group}_qa_icl", ())
        preface = "".join(f"Question: {r['question']}\nAnswer: {_first(r['answer'])}\n\n" for r in shots)
        prompts = [f"{preface}Question: {r['question']}\nAnswer:" for r in records]
        return _rouge_items(model, prompts, [_all(r["answer"]) for r in records], KNOWMEM_TOKENS)

    def _membership(
        self, model: Model, reference: Model | None
    ) -> dict[str, tuple[list[float], list[float]]]:
        forget, holdout = (
            membership_scores(model, [r["text"] for r in self.sets[f"privleak/{name}"]], MIN_K, reference)
            for name in ("forget", "holdout")
        )
        return {name: (forget[name], holdout[name]) for name in forget}


def read_muse(place: str | Path, limit: int | None = None) -> Muse:
    """Read those of MUSE's sets that are in a folder; from the hub (hf://muse-bench/MUSE-News) all of them.

    Raises:
        InputError: none of them is there, or one is not what MUSE has under that name.
    """
    source = BenchmarkFolder(str(place))
    wanted = {
        "verbmem/forget": ("prompt", "gt"),
        "privleak/forget": ("text",),
        "privleak/holdout": ("text",),
        **{f"knowmem/{g}_qa{i}": ("question", "answer") for g in ("forget", "retain") for i in ("", "_icl")},
    }
    sets = {
        name: source.read(name, None if name.endswith("_icl") else limit, *needed)
        for name, needed in wanted.items()
        if source.has(name)
    }
    if not sets:
        raise InputError(f"{place}: none of {', '.join(f'{name}.json' for name in wanted)} is there")
    facts = {
        g: [_fact(g, i, r) for i, r in enumerate(sets.get(f"knowmem/{g}_qa", ()))]
        for g in ("forget", "retain")
    }
    passages = [
        Fact(id=f"passage-{i}", prompt=str(r["prompt"]).rstrip(" "), target=_spaced(str(r["gt"])))
        for i, r in enumerate(sets.get("verbmem/forget", ()))
    ]
    return Muse(sets, facts["forget"] or passages, facts["retain"])


def _spaced(text: str) -> str:
    return text if text[:1].isspace() else f" {text}"


def _rouge_items(
    model: Model, prompts: Sequence[str], answers: Sequence[Sequence[str]], n: int
) -> Items | None:
    """Best ROUGE-L F of each generation against its answers; None where rouge-score is not installed."""
    room = None if model.context_length is None else model.context_length - n
    ids = [encode(model, Example(p, " .")).prompt_ids for p in prompts]
    written = generate(model, [i if room is None else i[-room:] for i in ids], n)
    try:
        scores = [
            max(metrics.rouge_l(a, text_before_stop(w))[1] for a in s)
            for s, w in zip(answers, written, strict=True)
        ]
    except ModuleNotFoundError:
        return None
    return Items(tuple(str(i) for i in range(len(scores))), torch.tensor(scores))


def text_before_stop(text: str, stops: Sequence[str] = STOPS) -> str:
    """The text before the first stop."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _fact(group: str, i: int, record: Mapping[str, Any]) -> Fact:
    answer = _first(record["answer"]).strip()
    prompt = f"Question: {record['question']}\nAnswer:"
    return Fact(id=f"{group}-{i}", prompt=prompt, target=f" {answer}", held_out=group == "retain")


def _all(answer: object) -> list[str]:
    return [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]


def _first(answer: object) -> str:
    return _all(answer)[0]
