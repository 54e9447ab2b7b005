"""How much of the edit is needed: forgetting and keeping at several strengths of the same change of weights.

At strength 0 stands the base, at 1 the edit; between them the weights are interpolated. An edit that has
forgotten everything at half its strength paid for the other half with nothing; one whose curve still falls at
1 has not gone far enough.
"""

from __future__ import annotations

import torch

from locus.audit.context import Context
from locus.audit.figure_values import Curve, FigureValues
from locus.audit.intervals import Items
from locus.audit.questions import Answers, Questions, ask
from locus.audit.state import State

MAX_HELD_OUT = 32
"""Held-out facts asked at each strength, the first ones of a seeded order."""


def run(state: State, context: Context) -> FigureValues:
    """Curves of p(target) on the forget facts and of right answers on held-out ones; edits only."""
    if state.role != "edit":
        return FigureValues()
    asked = {"forget": context.questions["forget"]}
    if (others := context.questions.get("held_out")) is not None:
        asked["held_out"] = _some(others, context.seed)
    strengths = tuple(sorted({0.0, 1.0, *context.settings.strengths}))
    points: dict[str, list[Items]] = {kind: [] for kind in asked}
    for strength in strengths:
        known = context.answers.get({0.0: context.base.name, 1.0: state.name}.get(strength, ""), {})
        with state.at_strength(context.base.model, strength) as model:
            for kind, questions in asked.items():
                told = known.get(kind)
                answers = ask(model, questions, context.max_tokens) if told is None else _of(told, questions)
                points[kind].append(answers.prob if kind == "forget" else answers.top1)
    return FigureValues(
        curves={f"strength.{kind}": Curve("strength", strengths, tuple(at)) for kind, at in points.items()}
    )


def _some(questions: Questions, seed: int) -> Questions:
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    return questions.take(sorted(order[:MAX_HELD_OUT]))


def _of(answers: Answers, questions: Questions) -> Answers:
    """The answers to some of the questions; each fact was asked once."""
    rows = [answers.facts.index(fact) for fact in questions.facts]
    return Answers(questions.facts, answers.nll[rows], answers.n_tokens[rows], answers.correct[rows])
