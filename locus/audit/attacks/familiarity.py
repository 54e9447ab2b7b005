"""WHP's familiarity by completion (Eldan & Russinovich 2023, arXiv:2310.02238): does it still talk of it.

The paper lets GPT-4 grade the completions; here a completion counts as familiar when it mentions the target.
The paper's second measure, by probability, is `familiarity.probability` of `locus.audit.attacks.choice`.
"""

from __future__ import annotations

import torch

from locus.audit.attacks.generation import generate
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.state import State


def run(state: State, context: Context) -> FigureValues:
    """Greedy completions of each prompt and its paraphrases, searched for the target."""
    asked = [context.questions[kind] for kind in ("forget", "paraphrase") if kind in context.questions]
    facts = tuple(fact for q in asked for fact in q.facts)
    targets = [example.target.strip().casefold() for q in asked for example in q.examples]
    with state.active() as model:
        written = generate(model, [e.prompt_ids for q in asked for e in q.encoded], context.max_new_tokens)
    said = [float(target in text.casefold()) for target, text in zip(targets, written, strict=True)]
    return FigureValues({"familiarity.completion": Items(facts, torch.tensor(said))})
