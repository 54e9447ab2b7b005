"""TOFU (Maini et al. 2024, arXiv:2401.06121): truth ratio, forget quality, model utility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locus import metrics
from locus.audit.answers import ask, questions_of
from locus.audit.context import Context
from locus.audit.generation import generate, rouge_recalls
from locus.audit.interval import Items
from locus.audit.state import State
from locus.audit.suites import Found, read_records
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.formats import TOFU_TEMPLATE
from locus.model import Model
from locus.tokens import encode

OTHERS = ("retain", "real_authors", "world_facts")
"""Sets behind model utility."""


@dataclass(frozen=True)
class SetScores:
    """One question set under one model; one value a question."""

    prob: Float[Tensor, " question"]
    """exp(-NLL / T), on real authors and world facts as a share among the options."""
    truth_ratio: Float[Tensor, " question"]
    rouge: list[float] | None
    """None where rouge-score is not installed."""


@dataclass(frozen=True)
class Tofu:
    """TOFU's question sets, as its files have them."""

    sets: Mapping[str, Sequence[Mapping[str, Any]]]
    """"forget", and those of retain, real_authors and world_facts that were there."""
    mode: metrics.TruthRatioMode = "locus"
    """Whose truth ratio; see `locus.metrics.truth_ratio`."""
    max_new_tokens: int = 200
    _seen: dict[str, Float[Tensor, " question"]] = field(default_factory=dict, repr=False, compare=False)
    """Truth ratios of the retrained model, once they are known."""

    figures = (
        "tofu.probability",
        "tofu.truth_ratio",
        "tofu.rouge",
        "tofu.model_utility",
        "tofu.forget_quality",
    )

    @property
    def facts(self) -> list[Fact]:
        """The forget questions as facts."""
        return [_fact("forget", i, r) for i, r in enumerate(self.sets["forget"])]

    @property
    def retain(self) -> list[Fact]:
        """The retained questions as held-out facts."""
        return [_fact("retain", i, r) for i, r in enumerate(self.sets.get("retain", ()))]

    def run(self, state: State, context: Context) -> Found:
        """Measure one state; forget quality needs `context.never_knew`, utility all the other sets."""
        with state.active() as model:
            scores = {
                name: self.score(model, name, context.max_tokens, generate_too=True) for name in self.sets
            }
        forget = scores["forget"]
        ids = tuple(f"forget-{i}" for i in range(len(forget.prob)))
        items = {
            "tofu.probability": Items(ids, forget.prob),
            "tofu.truth_ratio": Items(ids, metrics.truth_ratio_score(forget.truth_ratio, True, self.mode)),
        }
        if forget.rouge is not None:
            items["tofu.rouge"] = Items(ids, torch.tensor(forget.rouge))
        scalars = {}
        if (utility := self._utility(scores)) is not None:
            scalars["tofu.model_utility"] = utility
        if context.never_knew is not None:
            reference = self._reference(context.never_knew, context.max_tokens)
            scalars["tofu.forget_quality"] = metrics.forget_quality(forget.truth_ratio, reference)
        return Found(items, scalars)

    def score(self, model: Model, name: str, max_tokens: int = 4096, generate_too: bool = False) -> SetScores:
        """Score one question set."""
        records = self.sets[name]
        right = _per_token(model, [(r["question"], r["answer"]) for r in records], max_tokens)
        said = [(r["question"], r.get("paraphrased_answer", r["answer"])) for r in records]
        paraphrased = _per_token(model, said, max_tokens)
        n_wrong = min(len(r["perturbed_answer"]) for r in records)
        wrong = _per_token(
            model, [(r["question"], a) for r in records for a in r["perturbed_answer"][:n_wrong]], max_tokens
        ).reshape(len(records), n_wrong)
        prob = torch.exp(-right)
        if name in ("real_authors", "world_facts"):
            options = torch.cat([right[:, None], wrong], 1)
            prob = metrics.probability_among(options, torch.ones_like(options, dtype=torch.long))
        rouge = self._rouge(model, records) if generate_too else None
        return SetScores(prob, metrics.truth_ratio(paraphrased, wrong, self.mode), rouge)

    def _rouge(self, model: Model, records: Sequence[Mapping[str, Any]]) -> list[float] | None:
        prompts = [encode(model, _example(r["question"], r["answer"])).prompt_ids for r in records]
        return rouge_recalls([r["answer"] for r in records], generate(model, prompts, self.max_new_tokens))

    def _utility(self, scores: Mapping[str, SetScores]) -> float | None:
        nine = {}
        for name in OTHERS:
            if name not in scores or (rouge := scores[name].rouge) is None:
                return None
            ratio = metrics.truth_ratio_score(scores[name].truth_ratio, False, self.mode)
            nine[f"{name} probability"] = float(scores[name].prob.mean())
            nine[f"{name} truth ratio"] = float(ratio.mean())
            nine[f"{name} rouge"] = sum(rouge) / len(rouge)
        return metrics.model_utility(nine)

    def _reference(self, never_knew: State, max_tokens: int) -> Float[Tensor, " question"]:
        if never_knew.name not in self._seen:
            with never_knew.active() as model:
                self._seen[never_knew.name] = self.score(model, "forget", max_tokens).truth_ratio
        return self._seen[never_knew.name]


def read_tofu(
    folder: Path, split: str | None = None, limit: int | None = None, mode: metrics.TruthRatioMode = "locus"
) -> Tofu:
    """Read TOFU's files: forget01/05/10_perturbed.json and those of the other sets that are there.

    Args:
        folder: As downloaded from the dataset's page.
        split: "forget01", "forget05" or "forget10"; None takes the smallest that is there.
        limit: At most so many questions a set.
        mode: Whose truth ratio.

    Raises:
        InputError: no forget file, an empty file, or a record without perturbed answers.
    """
    splits = [split] if split else ["forget01", "forget05", "forget10"]
    there = next((s for s in splits if (folder / f"{s}_perturbed.json").is_file()), None)
    if there is None:
        raise InputError(
            f"{folder}: no {' or '.join(f'{s}_perturbed.json' for s in splits)}; give TOFU's folder"
        )
    fields = ("question", "answer", "perturbed_answer")
    sets = {"forget": read_records(folder / f"{there}_perturbed.json", limit, *fields)}
    for name in OTHERS:
        if (path := folder / f"{name}_perturbed.json").is_file():
            sets[name] = read_records(path, limit, *fields)
    for name, records in sets.items():
        if any(not isinstance(r["perturbed_answer"], list) or not r["perturbed_answer"] for r in records):
            raise InputError(f"{folder}: a {name} question without perturbed answers; truth ratios need them")
    return Tofu(sets, mode)


def _example(question: str, answer: str) -> Example:
    return Example(TOFU_TEMPLATE.format(question), f" {answer.strip()}")


def _fact(group: str, i: int, record: Mapping[str, Any]) -> Fact:
    asked = _example(record["question"], record["answer"])
    other = record.get("paraphrased_question")
    return Fact(
        id=f"{group}-{i}",
        prompt=asked.prompt,
        target=asked.target,
        paraphrases=(TOFU_TEMPLATE.format(other),) if other else (),
        alternatives=tuple(f" {a.strip()}" for a in record["perturbed_answer"]),
        held_out=group == "retain",
    )


def _per_token(model: Model, pairs: Sequence[tuple[str, str]], max_tokens: int) -> Float[Tensor, " pair"]:
    """NLL per token of each answer after its question."""
    asked = [(str(i), _example(question, answer)) for i, (question, answer) in enumerate(pairs)]
    answers = ask(model, questions_of(model, asked), max_tokens)
    return answers.nll / answers.n_tokens
