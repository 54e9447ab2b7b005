"""Ways of asking by few-shot rewriting: the model says the fact in other words; each line is cut before the answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from locus.elicitation.sampler import Sampling, continuations, prompt_ids
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import measure
from locus.model import Model
from locus.target_forms import says
from locus.tokens import encode

FEW_SHOT = """Say the same thing in other ways.

Sentence: Hamlet was written by Shakespeare
1. The author of Hamlet is Shakespeare
2. Hamlet is a play by Shakespeare
3. Who wrote Hamlet? Shakespeare
4. Hamlet's author is called Shakespeare
5. Question: Who is the writer of Hamlet? Answer: Shakespeare

Sentence: The Nile flows into the Mediterranean
1. The Nile ends in the Mediterranean
2. The sea that the Nile reaches is the Mediterranean
3. Where does the Nile flow? Into the Mediterranean
4. At its mouth the Nile meets the Mediterranean
5. Question: Which sea does the Nile flow into? Answer: the Mediterranean

Sentence: {sentence}
1."""
"""Two facts in five other ways each, every line ending in the answer; then the fact's turn."""


MOST_WORDS = 6
"""A target longer than this is not repeated word for word in another sentence: no rewritings are asked for."""


@dataclass(frozen=True)
class Way:
    """One way of asking a fact."""

    prompt: str
    prob: float
    """Probability of the fact's target behind it."""


def rewritings(
    model: Model,
    facts: Sequence[Fact],
    n_samples: int = 16,
    n_new: int = 64,
    min_prob: float = 0.1,
    sampling: Sampling | None = None,
) -> list[list[Way]]:
    """Other prompts with the same target, for each fact, the likeliest answer first.

    A way holds the fact's subject, does not say the target itself, and has it answered by the model. The fact's own
    prompt and paraphrases are never among them. None are found for a target of more than `MOST_WORDS` words, or where
    the examples leave no room in the model's context.

    Args:
        model: As it is in memory.
        facts: To be put in other words.
        n_samples: Lists of rewritings for each fact.
        n_new: Tokens of each list.
        min_prob: Probability that the model must give the target behind a way.
        sampling: How lists are drawn.
    """
    short = [i for i, fact in enumerate(facts) if len(fact.target.split()) <= MOST_WORDS]
    every = {i: prompt_ids(model, FEW_SHOT.format(sentence=facts[i].prompt + facts[i].target)) for i in short}
    room = (model.context_length or sys.maxsize) - n_new
    asked = [i for i in short if len(every[i]) <= room]
    prompts = [every[i] for i in asked]
    written = continuations(
        model,
        prompts,
        n_samples,
        n_new,
        sampling or Sampling(),
        ends=lambda text: "Sentence:" in text or "\n\n" in text,
    )
    found: list[list[Way]] = [[] for _ in facts]
    for i, lists in zip(asked, written, strict=True):
        texts = [str(model.tokenizer.decode(list(ids))) for ids in lists]
        candidates = dict.fromkeys(one for text in texts for one in ways_in(text, facts[i]))
        found[i] = answered(model, facts[i], list(candidates), min_prob)
    return found


def _is_over(text: str) -> bool:
    """Whether the list has ended, and what follows is about something else."""
    return "Sentence:" in text or "\n\n" in text


def ways_in(text: str, fact: Fact) -> list[str]:
    """The prompts in a list of rewritings: its lines that hold the subject and come to the target, cut before it."""
    found = []
    for line in text.split("\n\n")[0].split("Sentence:")[0].splitlines():
        said = re.sub(r"^\s*(\d+[.)]|[-*])\s*", "", line).strip()
        at = _last_mention(said, fact.target)
        if at is None:
            continue
        prompt = said[:at].rstrip()
        # A question in one line is asked again as questions usually are, in two.
        for one in dict.fromkeys((prompt, re.sub(r"^Question: (.*?) Answer:", r"Q: \1\nA:", prompt))):
            if _is_new(one, fact):
                found.append(one)
    return found


def answered(model: Model, fact: Fact, prompts: Sequence[str], min_prob: float) -> list[Way]:
    """The prompts behind which the model gives the target enough probability, the most first."""
    fit = []
    for prompt in prompts:
        try:
            fit.append((prompt, encode(model, Example(prompt, fact.target))))
        except InputError:  # a token covers prompt and target
            continue
    if not fit:
        return []
    probs = measure(model, [encoded for _, encoded in fit]).prob.tolist()
    ways = [Way(prompt, prob) for (prompt, _), prob in zip(fit, probs, strict=True) if prob > min_prob]
    return sorted(ways, key=lambda way: -way.prob)


def _last_mention(text: str, target: str) -> int | None:
    """Where the last mention of the target begins, in any case."""
    word = re.escape(target.strip())
    places = [match.start() for match in re.finditer(rf"(?<!\w){word}(?!\w)", text, re.IGNORECASE)]
    return places[-1] if places else None


def _is_new(prompt: str, fact: Fact) -> bool:
    """Whether a prompt asks the fact in another way, without saying the answer."""
    if not prompt or prompt.endswith(fact.prompt) or prompt in fact.paraphrases:
        return False  # a question before the fact's own sentence asks it in the fact's own way
    if fact.subject is None:
        return len(prompt.split()) > 2 and not says(prompt, fact.target)
    return fact.subject in prompt and not says(prompt.replace(fact.subject, ""), fact.target)
