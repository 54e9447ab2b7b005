"""What the model writes of its own accord: greedy generations, and how much of a target is memorized."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Bool
from torch import Tensor

from locus.audit.content_words import content_recall, is_said, is_sentence
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.questions import Questions
from locus.audit.state import State
from locus.chat_template import end_of_turn
from locus.errors import InputError
from locus.forward import batches, label_logits
from locus.metrics import exact_memorization, extraction_strength, rouge_l
from locus.model import Model
from locus.tokens import Encoded


def run(state: State, context: Context) -> FigureValues:
    """Exact memorization, extraction strength and ROUGE-L of the forget targets."""
    questions = context.questions["forget"]
    with state.active() as model:
        flags = greedy_flags(model, questions.encoded, context.max_tokens)
        known = context.written.get(state.name)
        written = known if known is not None else greedy_continuations(model, questions)
    targets = [example.target for example in questions.examples]
    found = {
        "generation.exact": [exact_memorization(f) for f in flags],
        "generation.extraction": [extraction_strength(f, context.settings.extraction) for f in flags],
    }
    if (recall := rouge_recalls(targets, written)) is not None:
        found["generation.rouge"] = recall
    return FigureValues({key: Items(questions.facts, torch.tensor(values)) for key, values in found.items()})


SHORT_ANSWER = 24
"""Tokens written after a prompt whose target is no longer than a few words."""
MOST_TOKENS = 256
_PREAMBLE = 16
"""Tokens that an answer may spend before it comes to a longer target."""


def greedy_continuations(model: Model, questions: Questions) -> tuple[str, ...]:
    """What the model writes after each prompt, long enough to say the target and a preamble, in the caller's order.

    A prompt that leaves no room in the model's context is answered by an empty text.
    """
    room = model.context_length
    lengths: dict[int, list[int]] = {}
    for i, one in enumerate(questions.encoded):
        wanted = SHORT_ANSWER if one.n_target <= SHORT_ANSWER - _PREAMBLE else one.n_target + _PREAMBLE
        wanted = min(-(-wanted // 8) * 8, MOST_TOKENS)
        wanted = wanted if room is None else min(wanted, room - one.target_start)
        if wanted > 0:
            lengths.setdefault(wanted, []).append(i)
    out = [""] * len(questions)
    for n, rows in lengths.items():
        prompts = [questions.encoded[i].prompt_ids for i in rows]
        for i, text in zip(rows, generate(model, prompts, n), strict=True):
            out[i] = text
    return tuple(out)


def said_figures(kind: str, questions: Questions, written: Sequence[str]) -> dict[str, Items]:
    """Whether each text says its target, and how often a text says other facts' targets.

    Args:
        kind: Kind of question; the figures' keys begin with it.
        questions: What was asked.
        written: The model's own continuation of each prompt.
    """
    said, chance = [], []
    targets = {example.target for example in questions.examples}
    for example, text in zip(questions.examples, written, strict=True):
        said.append(float(is_said(example.prompt, example.target, text)))
        others = [t for t in targets if t.strip().casefold() != example.target.strip().casefold()]
        hits = [is_said(example.prompt, other, text) for other in sorted(others)]
        chance.append(sum(hits) / len(hits) if hits else 0.0)
    values = {"said": said, "chance": chance}
    return {f"{kind}.{name}": Items(questions.facts, torch.tensor(v)) for name, v in values.items()}


def sentence_figures(
    model: Model, questions: Questions, written: Sequence[str], token_prob: Tensor, max_tokens: int = 4096
) -> dict[str, Items]:
    """What is left of the targets that are sentences; empty where there are none.

    One improbable token makes a sentence improbable as a whole; these figures see the rest of it.

    Args:
        model: Left as it is.
        questions: What is asked.
        written: The model's own continuation of each prompt.
        token_prob: Geometric mean of each target's token probabilities, " question".
        max_tokens: Batch size in tokens.
    """
    rows = [i for i, example in enumerate(questions.examples) if is_sentence(example.target)]
    if not rows:
        return {}
    chosen = questions.take(rows)
    flags = greedy_flags(model, chosen.encoded, max_tokens)
    recall = [
        content_recall(example.prompt, example.target, written[i])
        for i, example in zip(rows, chosen.examples, strict=True)
    ]
    return {
        "sentence.recall": Items(chosen.facts, torch.tensor(recall)),
        "sentence.extraction": Items(chosen.facts, torch.tensor([extraction_strength(f) for f in flags])),
        "sentence.token_prob": Items(chosen.facts, token_prob[rows]),
    }


def greedy_flags(
    model: Model, encoded: Sequence[Encoded], max_tokens: int = 4096
) -> list[Bool[Tensor, " token"]]:
    """For each example, which target tokens greedy decoding gets right when the ones before are given."""
    flags = [torch.zeros(e.n_target, dtype=torch.bool) for e in encoded]
    for batch in batches(encoded, max_tokens):
        with torch.no_grad():
            hits = label_logits(model, batch).argmax(-1).cpu() == batch.labels
        for example, position, hit in zip(
            batch.example.tolist(), batch.cols.tolist(), hits.tolist(), strict=True
        ):
            flags[example][position + 1 - encoded[example].target_start] = hit
    return flags


def generate(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, max_rows: int = 32
) -> list[str]:
    """Greedy continuations as text, in the caller's order, up to an end-of-sequence token of the checkpoint's.

    Prompts of unequal length share a batch, padded on the left, where the model then begins as it does without
    padding; where padding shifts its positions, only prompts of one length share one.

    Raises:
        InputError: a prompt leaves no room for `max_new_tokens` in the model's context.
    """
    limit = model.context_length
    longest = max((len(p) for p in prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(f"a prompt of {longest} tokens leaves no room for {max_new_tokens} more in {limit}")
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), max_rows):
        rows = order[start : start + max_rows]
        groups = [rows]
        if len(prompts[rows[0]]) < len(prompts[rows[-1]]) and not _padding_is_harmless(model, prompts, rows):
            groups = [list(same) for _, same in groupby(rows, key=lambda i: len(prompts[i]))]
        for group in groups:
            for i, text in zip(
                group, _continued(model, [prompts[i] for i in group], max_new_tokens), strict=True
            ):
                out[i] = text
    return out


def _padded(model: Model, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, padded on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids.to(model.device), mask.to(model.device)


def end_tokens(model: Model) -> tuple[int, ...]:
    """Tokens after which the model stops: the tokenizer's end of sequence and those of the generation config.

    An instructed checkpoint ends its turn with a token of its own, which often only generation_config.json names; in
    conversation that of the chat template counts too, where it is one token.
    """
    ends = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    listed = ends if isinstance(ends, list | tuple) else [ends]
    if model.chat and (end := end_of_turn(model.tokenizer)):
        turn = model.tokenizer(end, add_special_tokens=False).input_ids
        listed = [*listed, *(turn if len(turn) == 1 else ())]
    return tuple(dict.fromkeys(i for i in (model.tokenizer.eos_token_id, *listed) if i is not None))


def _continued(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """What the model writes after each prompt, in one batch."""
    from transformers import GenerationConfig

    ends = end_tokens(model)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    ids, mask = _padded(model, prompts)
    with torch.no_grad():
        tokens = model.module.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings, use_cache=True
        )
    return [
        str(model.tokenizer.decode(row, skip_special_tokens=True))
        for row in tokens[:, ids.shape[1] :].tolist()
    ]


@torch.no_grad()
def _padding_is_harmless(model: Model, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> bool:
    """Whether the shortest and the longest prompt of a batch get the same next-token logits padded and alone."""
    few = [list(prompts[i]) for i in (rows[0], rows[-1])]
    ids, mask = _padded(model, few)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    takes = "position_ids" in inspect.signature(model.module.forward).parameters
    extra = {"position_ids": positions} if takes else {}
    together = (
        model.module(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -1].float()
    )
    for row, prompt in enumerate(few):
        alone = (
            model.module(input_ids=torch.tensor([prompt], device=model.device), use_cache=False)
            .logits[0, -1]
            .float()
        )
        if (alone - together[row]).abs().max() > 0.01 * alone.std().clamp_min(1e-6):
            return False
    return True


def rouge_recalls(references: Sequence[str], candidates: Sequence[str]) -> list[float] | None:
    """ROUGE-L recalls, or None where rouge-score is not installed: then it is not measured."""
    try:
        return [rouge_l(r.strip(), c.strip())[0] for r, c in zip(references, candidates, strict=True)]
    except ModuleNotFoundError:
        return None
