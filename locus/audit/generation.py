"""What the model writes of its own accord: greedy generations, and how much of a target is memorized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from locus.audit.context import Context
from locus.audit.found import Found
from locus.audit.interval import Items
from locus.audit.state import State
from locus.errors import InputError
from locus.forward import batches, label_logits
from locus.metrics import exact_memorization, extraction_strength, rouge_l
from locus.model import Model
from locus.tokens import Encoded


def run(state: State, context: Context) -> Found:
    """Exact memorization, extraction strength and ROUGE-L of the forget targets."""
    questions = context.questions["forget"]
    with state.active() as model:
        flags = greedy_flags(model, questions.encoded, context.max_tokens)
        written = generate(model, [e.prompt_ids for e in questions.encoded], context.max_new_tokens)
    targets = [example.target for example in questions.examples]
    found = {
        "generation.exact": [exact_memorization(f) for f in flags],
        "generation.extraction": [extraction_strength(f, context.settings.extraction) for f in flags],
    }
    if (recall := rouge_recalls(targets, written)) is not None:
        found["generation.rouge"] = recall
    return Found({key: Items(questions.facts, torch.tensor(values)) for key, values in found.items()})


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
    """Greedy continuations as text, in the caller's order, up to the end-of-sequence token.

    Prompts of one length share a batch, so that nothing is ever padded: left padding shifts positions in
    some architectures.

    Raises:
        InputError: a prompt leaves no room for `max_new_tokens` in the model's context.
    """
    from transformers import GenerationConfig

    limit = model.context_length
    longest = max((len(p) for p in prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise InputError(f"a prompt of {longest} tokens leaves no room for {max_new_tokens} more in {limit}")
    eos = model.tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0 if eos is None else eos,
    )
    out = [""] * len(prompts)
    lengths = sorted({len(p) for p in prompts})
    for length in lengths:
        same = [i for i, p in enumerate(prompts) if len(p) == length]
        for start in range(0, len(same), max_rows):
            rows = same[start : start + max_rows]
            ids = torch.tensor([list(prompts[i]) for i in rows], device=model.device)
            with torch.no_grad():
                tokens = model.module.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    use_cache=True,
                )
            for i, row in zip(rows, tokens[:, length:].tolist(), strict=True):
                out[i] = str(model.tokenizer.decode(row, skip_special_tokens=True))
    return out


def rouge_recalls(references: Sequence[str], candidates: Sequence[str]) -> list[float] | None:
    """ROUGE-L recalls, or None where rouge-score is not installed: then it is not measured."""
    try:
        return [rouge_l(r.strip(), c.strip())[0] for r, c in zip(references, candidates, strict=True)]
    except ModuleNotFoundError:
        return None
