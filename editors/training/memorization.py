"""Memorization accuracy and extraction likelihood: Jang et al.'s two stopping measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from locus.forward import batches, label_logits
from locus.model import Model
from locus.tokens import Encoded


@torch.no_grad()
def memorization_accuracy(model: Model, encoded: Sequence[Encoded], max_tokens: int = 4096) -> float:
    """Share of the target tokens that are the model's first choice, teacher-forced; mean over examples.

    Jang et al. 2023 (arXiv:2210.01504), equation 3.
    """
    hits = torch.zeros(len(encoded))
    for batch in batches(encoded, max_tokens):
        right = (label_logits(model, batch).argmax(-1).cpu() == batch.labels).float()
        hits.index_add_(0, batch.example, right)
    return float((hits / torch.tensor([one.n_target for one in encoded])).mean())


@torch.no_grad()
def extraction_likelihood(model: Model, encoded: Sequence[Encoded], n: int = 10) -> float:
    """Mean overlap of greedy continuations with the rest of the target, over all prefixes of it.

    Jang et al. 2023, equation 4: for each prefix of at most T - n target tokens, the share of the continuation's
    n-grams that the rest of the target holds. A target shorter than n + 1 tokens is continued from the prompt
    alone, with n-grams of its own length if need be.

    Returns:
        Mean over examples, between 0 and 1.
    """
    per_example = []
    for one in encoded:
        size = min(n, one.n_target)
        overlaps = []
        for start in range(max(1, one.n_target - n)):
            rest = one.target_ids[start:]
            written = _greedy(model, one.ids[: one.target_start + start], len(rest))
            overlaps.append(ngram_overlap(written, rest, min(size, len(rest))))
        per_example.append(sum(overlaps) / len(overlaps))
    return sum(per_example) / len(per_example)


def ngram_overlap(written: Sequence[int], truth: Sequence[int], n: int) -> float:
    """Share of the n-grams of `written` that occur in `truth`; 0 when there is none."""
    grams = [tuple(written[i : i + n]) for i in range(len(written) - n + 1)]
    known = {tuple(truth[i : i + n]) for i in range(len(truth) - n + 1)}
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def _greedy(model: Model, prefix: Sequence[int], n_tokens: int) -> list[int]:
    ids = torch.tensor([list(prefix)], device=model.device)
    written = model.module.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=int(ids[0, 0]),
    )
    tokens: list[int] = written[0, len(prefix) :].tolist()
    return tokens
