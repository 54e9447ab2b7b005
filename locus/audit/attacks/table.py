"""The table of attacks: each one file, one line here."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from functools import partial

from locus.audit.attacks import (
    choice,
    depth,
    familiarity,
    generation,
    probe,
    prompts,
    relearn_lora,
    soft_prompt,
    strength,
)
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.state import State
from locus.errors import InputError

Attack = Callable[[State, Context], FigureValues]

BUILT_IN: Mapping[str, str] = {
    "lens": "logit lens at every layer: the target among the top or the bottom k",
    "relearn": "fine-tuning of all weights on half of the facts, tested on the other half",
    "rounding": "weights rounded to bfloat16, int8 and int4",
}
"""Attacks whose measurements have a place of their own, see `locus.audit.measurement`."""

ATTACKS: Mapping[str, tuple[Attack, str]] = {
    "prompts": (prompts.run, "templates, few-shot, jailbreak prefixes, question-and-answer and chat formats"),
    "strength": (strength.run, "the edit at several strengths: what it forgets and what it costs"),
    "choice": (choice.run, "multiple choice, truth ratio and familiarity by probability, against wrong alternatives"),
    "generation": (generation.run, "exact memorization, extraction strength, ROUGE-L of greedy generations"),
    "familiarity": (familiarity.run, "greedy completions that mention the target"),
    "probe": (probe.run, "linear probes per layer, trained on retained facts"),
    "depth": (depth.run, "hidden states of the edited model patched into the base (UDS)"),
    "relearn-lora": (relearn_lora.run, "low-rank adapters trained on half of the facts, tested on the other half"),
    "soft-prompt": (soft_prompt.run, "trainable embeddings before the prompt"),
}  # fmt: skip
"""Name -> what runs it, and what it is."""

NAMES: tuple[str, ...] = (*BUILT_IN, *ATTACKS)

RENAMED_ATTACKS: Mapping[str, str] = {"dose": "strength"}
"""Name in the release before -> name now; read for one release."""

FIGURES_OF: Mapping[str, tuple[str, ...]] = {
    "prompts": (
        "prompts.template.prob",
        "prompts.few_shot.prob",
        "prompts.jailbreak.prob",
        "prompts.format.prob",
        "prompts.any.top1",
    ),
    "strength": (),
    "choice": ("choice.cloze", "choice.letter", "choice.truth_ratio", "familiarity.probability"),
    "generation": ("generation.exact", "generation.extraction", "generation.rouge"),
    "familiarity": ("familiarity.completion",),
    "probe": ("probe.top1",),
    "depth": ("depth.drop", "depth.erased"),
    "relearn-lora": ("relearn.lora.prob", "relearn.lora.taught.prob"),
    "soft-prompt": ("soft_prompt.prob", "soft_prompt.taught.prob"),
}
"""Name -> keys of the figures it can measure."""

_ALTERNATIVES = "no forget fact has wrong alternatives"
_RETRAINED = "needs a model retrained without the forget set (--never-knew)"
_ROUGE = "needs rouge-score: pip install locus-unlearn[rouge]"
WHY_NOT: Mapping[str, str] = {
    "prompts.few_shot.prob": "needs three other facts to show",
    "choice.cloze": _ALTERNATIVES,
    "choice.letter": _ALTERNATIVES,
    "choice.truth_ratio": _ALTERNATIVES,
    "familiarity.probability": _ALTERNATIVES,
    "generation.rouge": _ROUGE,
    "probe.top1": "needs 10 retained prompts to train on, and held-out facts",
    "depth.erased": _RETRAINED,
    "relearn.lora.prob": "needs two forget facts",
    "relearn.lora.taught.prob": "needs two forget facts",
    "soft_prompt.taught.prob": "needs two forget facts, and room in the context",
    "soft_prompt.prob": "needs two forget facts, and room in the context",
    "tofu.forget_quality": _RETRAINED,
    "tofu.model_utility": "needs retain, real authors and world facts with perturbed answers, and rouge-score",
    "tofu.rouge": _ROUGE,
    "muse.verbmem_f": f"needs verbmem/forget.json, and {_ROUGE.removeprefix('needs ')}",
    "muse.knowmem_f": f"needs knowmem/forget_qa.json, and {_ROUGE.removeprefix('needs ')}",
    "muse.knowmem_r": f"needs knowmem/retain_qa.json, and {_ROUGE.removeprefix('needs ')}",
    "muse.privacy_auc": "needs privleak/forget.json and privleak/holdout.json",
    "muse.privleak": _RETRAINED,
    "membership.reference": _RETRAINED,
}
"""Figure key -> why it may be missing."""


def attacks_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the attacks asked for, in the table's order; "all" is every one, "none" none.

    Raises:
        InputError: there is no such attack, or "none" beside others.
    """
    for old in sorted(RENAMED_ATTACKS.keys() & set(names)):
        warnings.warn(f"audit: the attack {old} is now called {RENAMED_ATTACKS[old]}", stacklevel=2)
    names = tuple(RENAMED_ATTACKS.get(name, name) for name in names)
    if "all" in names:
        return NAMES
    if "none" in names:
        if len(names) > 1:
            raise InputError("audit: attacks none and others at once; give one or the other")
        return ()
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"audit: there is no attack {name!r}; {guess}there are {', '.join(NAMES)}, all, none"
            )
    return tuple(name for name in NAMES if name in names)


def attack_all(names: tuple[str, ...], state: State, context: Context) -> FigureValues:
    """What the named attacks of `ATTACKS` found out about a state."""
    found = FigureValues()
    for name in names:
        if name in ATTACKS:
            run = partial(ATTACKS[name][0], state, context)
            found |= context.finished.take(["attack", name, state.identity], FigureValues, run)
    return found
