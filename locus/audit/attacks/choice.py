"""Multiple choice: can it still tell the right answer from wrong ones of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.questions import ask, questions_of
from locus.audit.state import State
from locus.fact import Example, Fact
from locus.metrics import multiple_choice_right, probability_among, truth_ratio, truth_ratio_score
from locus.model import Model

OPTION_LETTERS = "ABCDEFGHIJ"


def run(state: State, context: Context) -> FigureValues:
    """Cloze form, letter form and truth ratio over the facts that have wrong alternatives."""
    facts = [f for f in context.facts if f.alternatives]
    if not facts:
        return FigureValues()
    ids = tuple(f.id for f in facts)
    with state.active() as model:
        cloze, among = _cloze(model, facts, context.max_tokens)
        letters = by_letter(model, [letter_question(f, context.seed) for f in facts], context.max_tokens)
        ratios = _truth_ratios(model, facts, context)
    return FigureValues(
        {
            "choice.cloze": Items(ids, torch.tensor(cloze)),
            "familiarity.probability": Items(ids, torch.tensor(among)),
            "choice.letter": Items(ids, torch.tensor(letters)),
            "choice.truth_ratio": Items(ids, torch.tensor(ratios)),
        }
    )


def letter_question(fact: Fact, seed: int) -> tuple[str, int, int]:
    """The question with lettered options in a seeded order: text, index of the right one, number of options."""
    options = [fact.target, *fact.alternatives][: len(OPTION_LETTERS)]
    generator = torch.Generator().manual_seed(seed + sum(fact.id.encode()))
    order = torch.randperm(len(options), generator=generator).tolist()
    lines = "".join(f"{OPTION_LETTERS[i]}. {options[j].strip()}\n" for i, j in enumerate(order))
    return f"Complete: {fact.prompt} ...\n{lines}Answer:", order.index(0), len(options)


def by_letter(model: Model, asked: Sequence[tuple[str, int, int]], max_tokens: int = 4096) -> list[float]:
    """1 for each lettered question (text, right index, number of options) whose right letter is likeliest."""
    pairs = [
        (str(i), Example(text, f" {OPTION_LETTERS[o]}"))
        for i, (text, _, n) in enumerate(asked)
        for o in range(n)
    ]
    nll = ask(model, questions_of(model, pairs), max_tokens).nll
    scores, start = [], 0
    for _, right, n in asked:
        row = nll[None, start : start + n]
        hit = multiple_choice_right(
            row, torch.ones_like(row, dtype=torch.long), torch.tensor([right]), per_token=False
        )
        scores.append(float(hit))
        start += n
    return scores


def _cloze(model: Model, facts: Sequence[Fact], max_tokens: int) -> tuple[list[float], list[float]]:
    """For each fact: is the target likelier per token than every alternative; its share among them."""
    pairs = [(f.id, Example(f.prompt, t)) for f in facts for t in (f.target, *f.alternatives)]
    answers = ask(model, questions_of(model, pairs), max_tokens)
    hits, shares, start = [], [], 0
    for fact in facts:
        stop = start + 1 + len(fact.alternatives)
        nll, n = answers.nll[None, start:stop], answers.n_tokens[None, start:stop]
        hits.append(float(multiple_choice_right(nll, n, torch.tensor([0]))))
        shares.append(float(probability_among(nll, n).nan_to_num(0.0)))
        start = stop
    return hits, shares


def _truth_ratios(model: Model, facts: Sequence[Fact], context: Context) -> list[float]:
    """TOFU's truth-ratio score of each fact: 1 where right and wrong targets are equally likely.

    The right target is the paraphrased one where the fact has it, as TOFU's wrong answers are made from that.
    """
    pairs = [
        (f.id, Example(f.prompt, t))
        for f in facts
        for t in (f.paraphrased_target or f.target, *f.alternatives)
    ]
    answers = ask(model, questions_of(model, pairs), context.max_tokens)
    per_token, mode = answers.nll / answers.n_tokens, context.settings.truth_ratio
    scores, start = [], 0
    for fact in facts:
        stop = start + 1 + len(fact.alternatives)
        ratio = truth_ratio(per_token[start : start + 1], per_token[None, start + 1 : stop], mode)
        scores.append(float(truth_ratio_score(ratio, True, mode).nan_to_num(0.0)))
        start = stop
    return scores
