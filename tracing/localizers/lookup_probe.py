"""Fact-lookup MLPs by probing: those behind which the answer can be read off the subject, and not before.

While it reads the subject's last token, a model looks up what it knows of it; the MLPs that do are those where the
attribute becomes linearly decodable there (Nanda et al. 2023, "Fact Finding"; as a place to edit, Guo et al. 2024,
arXiv:2410.12949). For each relation, with x the residual stream at the subject's last token divided by its root mean
square, and y the one-hot answer among those that at least `least` facts of the relation share:

    y ~ b + W x by ridge regression,  decodability = 1 - sum |y - y_without|^2 / sum |y - mean_without|^2,

where "without" means: of a probe (or a mean) that has seen no fact with this subject. That is leave-one-out in closed
form (one solve, no refitting), 1 if every answer is read off new subjects, and 0 or less if the probe knows no
more than the answers' frequencies. Score of an MLP = decodability behind it minus decodability of the same stream
without what it added, both at least 0; mean over relations, weighted by their facts.

Within an MLP neurons are ordered by saliency, as for `fact-lookup`. The paper fits logistic probes and looks at
their accuracy; squared error has a closed form and does not jump with single facts.

Use it for relations with few answers and many subjects (countries and continents, athletes and sports); a retain set of
the same relations is probed with the facts. It needs at least two answers with `least` facts each in some
relation, and with fewer than some 30 facts per relation the curve is mostly noise. It cannot work where every fact has
its own answer: see `fact-lookup` for these. On SmolLM2, for the continents of 48 countries, decodability climbs from
.07 to .57 in the first nine layers, and stays below 0 with the answers shuffled (benchmarks/README.md).

Cost: one forward per fact of either set, and a saliency pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact
from locus.forward import batches
from locus.hooks import record
from locus.model import Model
from locus.progress import track
from locus.scores import LayerScores, NeuronScores
from locus.tokens import Encoded, encode
from tracing.localizer import Cost, Examples
from tracing.localizers.fact_lookup import by_layer


@dataclass(frozen=True)
class RelationFacts:
    """The facts of one relation whose answers can be told apart."""

    facts: tuple[Fact, ...]
    answers: Int[Tensor, " fact"]
    subjects: Int[Tensor, " fact"]
    """Facts of one subject are left out together."""


@dataclass(frozen=True)
class AccuracyCurve:
    """Decodability of the answer at the subject's last token."""

    before: Float[Tensor, " layer"]
    """In the stream behind each block, without what its MLP added."""
    behind: Float[Tensor, " layer"]
    """In the stream behind each block."""


@dataclass(frozen=True)
class LookupProbe:
    """MLPs where linear probes begin to read the answer off the subject."""

    least: int = 4
    """Facts that must share an answer for it to be probed for."""
    ridge: float = 0.1
    """Penalty, in units of the centred states' mean squared norm."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward per fact of either set, and a saliency pass over the facts."""
        return Cost(2 * len(facts) + len(retain or ()), len(facts))

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Order neurons by their MLP's score, then by saliency.

        Raises:
            InputError: no facts, one without a subject, or too few facts that share an answer.
        """
        curve = self.curve(model, facts, retain, batch_tokens=batch_tokens)
        rise = curve.behind.clamp(min=0) - curve.before.clamp(min=0)
        layers = LayerScores(rise, "lookup-probe", model.fingerprint, model.atlas, asdict(self))
        return by_layer(layers, model, facts, batch_tokens)

    def curve(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> AccuracyCurve:
        """Decodability before and behind every MLP, the mean over relations.

        Raises:
            InputError: see `run`.
        """
        questions = self._questions(facts, retain)
        before, behind = torch.zeros(2, model.atlas.n_layers, dtype=torch.float64)
        total = sum(len(question.facts) for question in questions)
        for question in track(questions, "probes"):
            without, whole = subject_states(model, question.facts, batch_tokens)
            share = len(question.facts) / total
            for layer in range(model.atlas.n_layers):
                for states, sums in ((without, before), (whole, behind)):
                    found = decodability(states[:, layer], question.answers, question.subjects, self.ridge)
                    sums[layer] += share * found
        return AccuracyCurve(before.float(), behind.float())

    def _questions(self, facts: Examples, retain: Examples | None) -> list[RelationFacts]:
        if not facts:
            raise InputError("no facts given: a localizer needs at least one")
        if not self.ridge > 0:
            raise InputError(f"ridge is {self.ridge:g}: give a penalty above 0")
        told = _told(facts)
        relations = {fact.relation for fact in told}
        each = {(f.prompt, f.target): f for f in [*told, *_told(retain or ())] if f.relation in relations}
        pool: dict[str | None, list[Fact]] = {}
        for fact in each.values():
            pool.setdefault(fact.relation, []).append(fact)
        questions = [q for some in pool.values() if (q := question_of(some, self.least)) is not None]
        if not questions:
            most = max((Counter(f.target for f in some) for some in pool.values()), key=_second)
            said = ", ".join(f"{answer.strip()!r} {n}" for answer, n in most.most_common(2))
            raise InputError(
                f"lookup-probe needs two answers that {self.least} facts each share in one relation, and has at best "
                f"{said}: add facts (the retain set's count), lower least, or use fact-lookup"
            )
        return questions


def question_of(facts: Sequence[Fact], least: int) -> RelationFacts | None:
    """The facts whose answer at least `least` of them share, or None where there are not two such answers."""
    counts = Counter(fact.target for fact in facts)
    kept = [fact for fact in facts if counts[fact.target] >= max(2, least)]
    answers = sorted({fact.target for fact in kept})
    if len(answers) < 2:
        return None
    subjects = sorted({str(fact.subject) for fact in kept})
    return RelationFacts(
        tuple(kept),
        torch.tensor([answers.index(fact.target) for fact in kept]),
        torch.tensor([subjects.index(str(fact.subject)) for fact in kept]),
    )


def decodability(
    states: Float[Tensor, "fact d_model"],
    answers: Int[Tensor, " fact"],
    subjects: Int[Tensor, " fact"],
    ridge: float,
) -> float:
    """Share of the answers' variance that a ridge probe predicts for subjects it has not seen.

    Equals refitting the probe without each subject, the penalty staying as it is.

    Args:
        states: One per fact; their scale does not matter.
        answers: Class of each fact.
        subjects: Facts of one subject are left out together.
        ridge: Penalty in units of the centred states' mean squared norm.

    Returns:
        At most 1; 0 where the probe predicts as well as the mean, below where worse.
    """
    x = states.double()
    x = x / x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    x = x - x.mean(0)
    y = torch.nn.functional.one_hot(answers).double()
    n = len(x)
    kernel = x @ x.T
    penalty = ridge * kernel.diagonal().mean().clamp(min=1e-12)
    hat = torch.linalg.solve(kernel + penalty * torch.eye(n, dtype=x.dtype), kernel)
    mean = torch.full((n, n), 1 / n, dtype=x.dtype)
    return float(1 - _left_out(hat + mean, y, subjects) / _left_out(mean, y, subjects))


def _left_out(hat: Tensor, y: Tensor, subjects: Tensor) -> Tensor:
    """Squared error of a linear smoother y -> hat y, each subject's facts predicted without them."""
    residual = y - hat @ y
    error = torch.zeros((), dtype=y.dtype)
    for subject in subjects.unique():
        own = (subjects == subject).nonzero().flatten()
        inside = torch.eye(len(own), dtype=y.dtype) - hat[own][:, own]
        error += torch.linalg.solve(inside, residual[own]).square().sum()
    return error


@torch.no_grad()
def subject_states(
    model: Model, facts: Sequence[Fact], batch_tokens: int
) -> tuple[Float[Tensor, "fact layer d_model"], Float[Tensor, "fact layer d_model"]]:
    """The stream behind every block at the subject's last token: without what the MLP added, and whole.

    Raises:
        InputError: a fact without a subject.
    """
    atlas = model.atlas
    encoded = [encode(model, fact) for fact in facts]
    ends = torch.tensor([_last_of_subject(fact, one) for fact, one in zip(facts, encoded, strict=True)])
    whole = torch.zeros(len(facts), atlas.n_layers, atlas.d_model)
    without = torch.zeros_like(whole)
    for batch in batches(encoded, batch_tokens):
        index = torch.tensor(batch.examples)
        rows = torch.arange(len(index))
        device = model.device
        with record(model.module, outputs=[*atlas.blocks, *atlas.mlp_out]) as seen:
            model.module(
                input_ids=batch.ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
        for layer, (block, mlp) in enumerate(zip(atlas.blocks, atlas.mlp_out, strict=True)):
            stream = seen.outputs[block].float().cpu()[rows, ends[index]]
            whole[index, layer] = stream
            without[index, layer] = stream - seen.outputs[mlp].float().cpu()[rows, ends[index]]
    return without, whole


def _last_of_subject(fact: Fact, encoded: Encoded) -> int:
    if encoded.subject is None:
        raise InputError(
            f"fact {fact.id!r} has no subject: lookup-probe reads at the subject's last token; add the field"
        )
    return encoded.subject[1] - 1


def _told(examples: Examples) -> list[Fact]:
    """The facts among them that have an answer and a subject to be probed at."""
    for example in examples:
        if not isinstance(example, Fact):
            raise InputError("lookup-probe reads at a fact's subject: give facts, not bare prompts or tokens")
    return [example for example in examples if isinstance(example, Fact)]


def _second(counts: Counter[str]) -> tuple[int, int]:
    """Facts of the second most frequent answer, then of the first."""
    first, second = [*(n for _, n in counts.most_common(2)), 0][:2]
    return second, first
