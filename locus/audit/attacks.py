"""The table of further attacks: each one file, one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from locus.audit import choice, depth, familiarity, generation, probe, prompts, soft_prompt
from locus.audit.context import Context
from locus.audit.interval import Items
from locus.audit.state import State
from locus.errors import InputError

Attack = Callable[[State, Context], Mapping[str, Items]]

ATTACKS: Mapping[str, tuple[Attack, str]] = {
    "prompts": (prompts.run, "few-shot, jailbreak prefixes, question-and-answer and chat formats"),
    "choice": (choice.run, "multiple choice against wrong alternatives, and familiarity by probability"),
    "generation": (generation.run, "exact memorization, extraction strength, ROUGE-L of greedy generations"),
    "familiarity": (familiarity.run, "greedy completions that mention the target"),
    "probe": (probe.run, "linear probes per layer, trained on retained facts"),
    "depth": (depth.run, "hidden states of the edited model patched into the base (UDS)"),
    "soft_prompt": (soft_prompt.run, "trainable embeddings before the prompt"),
}
"""Name -> what runs it, and what it is."""


FIGURES_OF: Mapping[str, tuple[str, ...]] = {
    "prompts": ("prompts.few_shot.prob", "prompts.jailbreak.prob", "prompts.format.prob", "prompts.any.top1"),
    "choice": ("choice.cloze", "choice.letter", "familiarity.probability"),
    "generation": ("generation.exact", "generation.extraction", "generation.rouge"),
    "familiarity": ("familiarity.completion",),
    "probe": ("probe.top1",),
    "depth": ("depth.drop", "depth.erased"),
    "soft_prompt": ("soft_prompt.prob",),
}
"""Name -> keys of the figures it can measure."""

WHY_NOT: Mapping[str, str] = {
    "prompts.few_shot.prob": "needs three retained facts to show",
    "choice.cloze": "no forget fact has wrong alternatives",
    "choice.letter": "no forget fact has wrong alternatives",
    "familiarity.probability": "no forget fact has wrong alternatives",
    "generation.rouge": "needs rouge-score: pip install locus-unlearn[rouge]",
    "probe.top1": "needs 10 retained prompts to train on, and held-out facts",
    "depth.erased": "needs a model retrained without the forget set",
    "soft_prompt.prob": "needs two forget facts, and room in the context",
    "tofu.forget_quality": "needs a model retrained without the forget set",
    "tofu.model_utility": "needs retain, real authors and world facts with perturbed answers, and rouge-score",
    "tofu.rouge": "needs rouge-score: pip install locus-unlearn[rouge]",
    "muse.privleak": "needs a model retrained without the forget set",
}
"""Figure key -> why it may be missing."""


def attacks_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the attacks asked for; "all" is every one.

    Raises:
        InputError: there is no such attack.
    """
    if "all" in names:
        return tuple(ATTACKS)
    for name in names:
        if name not in ATTACKS:
            raise InputError(f"audit: there is no attack {name!r}; there are {', '.join(ATTACKS)}, or all")
    return names


def attack_all(names: tuple[str, ...], state: State, context: Context) -> dict[str, Items]:
    """Values of every figure that the named attacks could measure of a state."""
    found: dict[str, Items] = {}
    for name in names:
        found |= ATTACKS[name][0](state, context)
    return found
