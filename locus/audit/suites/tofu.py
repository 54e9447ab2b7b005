"""TOFU (Maini et al. 2024, arXiv:2401.06121): truth ratio, forget quality, model utility.

Probabilities are per token of the answer. For a model that is asked in conversation (`--chat`) the end of turn is one
of the answer's tokens, as the end of text is in the labels of TOFU's code and of OpenUnlearning. In plain form it is
not counted, so that figures of a plain model differ from theirs by that one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locus import metrics
from locus.audit.attacks.generation import generate, rouge_recalls
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.questions import ask, questions_of
from locus.audit.state import State
from locus.audit.suites.source import BenchmarkFolder
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.model import Model
from locus.readers.formats import TOFU_TEMPLATE
from locus.tokens import encode

OTHERS = ("retain", "real_authors", "world_facts")
"""Sets behind model utility."""
SPLITS = ("forget01", "forget05", "forget10")


@dataclass(frozen=True)
class SetScores:
    """One question set under one model; one value a question."""

    prob: Float[Tensor, " question"]
    """exp(-NLL / T), in conversation with the end of turn among the T tokens; on real authors and world facts as a
    share among the options."""
    truth_ratio: Float[Tensor, " question"]
    rouge: list[float] | None
    """None where rouge-score is not installed."""


@dataclass(frozen=True)
class Tofu:
    """TOFU's question sets, as its files have them."""

    sets: Mapping[str, Sequence[Mapping[str, Any]]]
    """"forget", and those of retain, real_authors and world_facts that were there."""
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

    def run(self, state: State, context: Context) -> FigureValues:
        """Measure one state; forget quality needs `context.never_knew`, utility all the other sets."""
        mode = context.settings.truth_ratio
        with state.active() as model:
            scores = {name: self.score(model, name, context.max_tokens, mode, True) for name in self.sets}
        forget = scores["forget"]
        ids = tuple(f"forget-{i}" for i in range(len(forget.prob)))
        items = {
            "tofu.probability": Items(ids, forget.prob),
            "tofu.truth_ratio": Items(ids, metrics.truth_ratio_score(forget.truth_ratio, True, mode)),
        }
        if forget.rouge is not None:
            items["tofu.rouge"] = Items(ids, torch.tensor(forget.rouge))
        scalars = {}
        if (utility := _utility(scores, mode)) is not None:
            scalars["tofu.model_utility"] = utility
        if context.never_knew is not None:
            reference = self._reference(context.never_knew, context.max_tokens, mode)
            scalars["tofu.forget_quality"] = metrics.forget_quality(forget.truth_ratio, reference)
        return FigureValues(items, scalars)

    def score(
        self,
        model: Model,
        name: str,
        max_tokens: int = 4096,
        mode: metrics.TruthRatioMode = "locus",
        generate_too: bool = False,
    ) -> SetScores:
        """Score one question set, by the truth ratio of `mode` (see `locus.metrics.truth_ratio`)."""
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
        return SetScores(prob, metrics.truth_ratio(paraphrased, wrong, mode), rouge)

    def _rouge(self, model: Model, records: Sequence[Mapping[str, Any]]) -> list[float] | None:
        prompts = [encode(model, _example(r["question"], r["answer"])).prompt_ids for r in records]
        return rouge_recalls([r["answer"] for r in records], generate(model, prompts, self.max_new_tokens))

    def _reference(
        self, never_knew: State, max_tokens: int, mode: metrics.TruthRatioMode
    ) -> Float[Tensor, " question"]:
        if never_knew.name not in self._seen:
            with never_knew.active() as model:
                self._seen[never_knew.name] = self.score(model, "forget", max_tokens, mode).truth_ratio
        return self._seen[never_knew.name]


def _utility(scores: Mapping[str, SetScores], mode: metrics.TruthRatioMode) -> float | None:
    nine = {}
    for name in OTHERS:
        if name not in scores or (rouge := scores[name].rouge) is None:
            return None
        ratio = metrics.truth_ratio_score(scores[name].truth_ratio, False, mode)
        nine[f"{name} probability"] = float(scores[name].prob.mean())
        nine[f"{name} truth ratio"] = float(ratio.mean())
        nine[f"{name} rouge"] = sum(rouge) / len(rouge)
    return metrics.model_utility(nine)


def read_tofu(place: str | Path, limit: int | None = None) -> Tofu:
    """Read TOFU: forget01, 05 or 10 with perturbed answers, and those of the other sets that are there.

    Args:
        place: The folder as downloaded from the dataset's page, or hf://locuslab/TOFU: the smallest forget set that
            is there. A forget file itself (.../forget05_perturbed.json, hf://locuslab/TOFU/forget05_perturbed) is
            that one.
        limit: At most so many questions a set.

    Raises:
        InputError: no forget file, an empty file, or a record without perturbed answers.
    """
    source, asked = _source(str(place))
    there = next((s for s in ([asked] if asked else SPLITS) if source.has(f"{s}_perturbed")), None)
    if there is None:
        names = " or ".join(f"{s}_perturbed.json" for s in ([asked] if asked else SPLITS))
        raise InputError(f"{place}: no {names}; give TOFU's folder")
    fields = ("question", "answer", "perturbed_answer")
    sets = {"forget": source.read(f"{there}_perturbed", limit, *fields)}
    for name in OTHERS:
        if source.has(f"{name}_perturbed"):
            sets[name] = source.read(f"{name}_perturbed", limit, *fields)
    for name, records in sets.items():
        if any(not isinstance(r["perturbed_answer"], list) or not r["perturbed_answer"] for r in records):
            raise InputError(f"{place}: a {name} question without perturbed answers; truth ratios need them")
    return Tofu(sets)


def _source(place: str) -> tuple[BenchmarkFolder, str | None]:
    """Where the sets are, and the forget set that `place` names, if it names one."""
    parent, _, last = place.rstrip("/").rpartition("/")
    split = last.split(".")[0].removesuffix("_perturbed")
    named = split in SPLITS and not Path(place).is_dir()
    return (BenchmarkFolder(parent or "."), split) if named else (BenchmarkFolder(place), None)


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
        paraphrased_target=f" {said.strip()}" if (said := record.get("paraphrased_answer")) else None,
        held_out=group == "retain",
    )


def _per_token(model: Model, pairs: Sequence[tuple[str, str]], max_tokens: int) -> Float[Tensor, " pair"]:
    """NLL per token of each answer after its question."""
    asked = [(str(i), _example(question, answer)) for i, (question, answer) in enumerate(pairs)]
    answers = ask(model, questions_of(model, asked), max_tokens)
    return answers.nll / answers.n_tokens
