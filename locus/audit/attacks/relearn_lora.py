"""Relearning by low-rank adapters: the cheap attacker, beside the one who trains all weights."""

from __future__ import annotations

from dataclasses import replace

from locus.audit.attacks.relearn import relearn
from locus.audit.context import Context
from locus.audit.figure_values import Curve, FigureValues
from locus.audit.intervals import Items
from locus.audit.state import State


def run(state: State, context: Context) -> FigureValues:
    """p(target) of the untaught half while adapters are trained on the other; nothing of the base."""
    forget = context.questions["forget"]
    if state.role == "base" or len(forget) < 2:
        return FigureValues()
    attack = replace(context.settings.relearn, method="lora", lr=None)
    with state.active() as model:
        curve = relearn(model, forget, attack, context.max_tokens)
    points = tuple(curve.tested_items(i) for i in range(len(curve.steps)))
    return FigureValues(
        {
            "relearn.lora.prob": points[-1],
            "relearn.lora.taught.prob": Items(curve.taught, curve.taught_prob[-1]),
        },
        curves={"relearn.lora": Curve("step", tuple(map(float, curve.steps)), points)},
    )
