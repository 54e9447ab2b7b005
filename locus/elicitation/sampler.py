"""Sample many continuations of many prompts that begin alike: the common beginning is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from locus import progress
from locus.errors import InputError
from locus.model import Model
from locus.random_streams import generator

CANDIDATES = 100
"""Tokens that a draw chooses among at most: the likeliest. To sort a whole vocabulary costs more than a small model."""


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn."""

    temperature: float = 0.9
    """> 0. Logits are divided by it."""
    top_p: float = 0.95
    """Nucleus: the likeliest tokens that have this probability together, `CANDIDATES` of them at most."""
    seed: int = 0
    """Seed of the draws. A prompt's draws do not depend on the prompts beside it."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature = {self.temperature}: must be positive")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}: must be above 0 and at most 1")


def prompt_ids(model: Model, text: str) -> list[int]:
    """A text's tokens, behind the model's `bos` where it has one."""
    ids = list(model.tokenizer(text, add_special_tokens=False).input_ids)
    return ids if model.bos is None or ids[:1] == [model.bos] else [model.bos, *ids]


@torch.no_grad()
def continuations(
    model: Model,
    prompts: Sequence[Sequence[int]],
    n_each: int,
    n_new: int,
    sampling: Sampling,
    *,
    ends: Callable[[str], bool] | None = None,
    max_rows: int = 128,
) -> list[list[tuple[int, ...]]]:
    """`n_each` sampled continuations of each prompt, at most `n_new` tokens long; special tokens end one.

    All rows begin at the end of what all prompts have in common, whose keys and values are computed once, and feed
    the rest of their prompt before they draw. No row is padded, so this holds for any position scheme.

    Args:
        model: As it is in memory.
        prompts: Token ids, at least one each.
        n_each: Continuations of each prompt.
        n_new: Tokens a continuation has at most.
        sampling: Temperature, nucleus, seed.
        ends: Whether a continuation's text so far is enough; looked at every eighth token.
        max_rows: Rows in one forward.

    Returns:
        For each prompt its continuations, without special tokens.

    Raises:
        InputError: an empty prompt, or one that leaves no room in the model's context.
    """
    found: list[list[tuple[int, ...]]] = [[() for _ in range(n_each)] for _ in prompts]
    if not prompts or not n_each or not n_new:
        return found
    longest, limit = max(map(len, prompts)), model.context_length
    if not min(map(len, prompts)):
        raise InputError("a prompt without tokens: there is nothing to continue")
    if limit is not None and longest + n_new > limit:
        raise InputError(
            f"a prompt of {longest} tokens leaves no room for {n_new} more in {limit}: shorten the facts' prompts"
        )
    common = _common(prompts)
    shared = _read(model, torch.tensor([prompts[0][:common]]), None).past_key_values if common else None
    order = sorted((i for i in range(len(prompts)) for _ in range(n_each)), key=lambda i: len(prompts[i]))
    seen: dict[int, int] = {}
    with progress.task("sampling", total=len(order)) as line:
        for start in range(0, len(order), max_rows):
            rows = []
            for i in order[start : start + max_rows]:
                number = seen[i] = seen.get(i, -1) + 1
                rows.append(
                    _Row(i, number, list(prompts[i]), common, _draws(sampling, prompts[i], number, n_new))
                )
            _run(model, rows, _copied(shared, len(rows)), common, n_new, sampling, ends)
            for row in rows:
                found[row.prompt][row.number] = tuple(row.written)
            line.advance(len(rows))
    return found


class _Row:
    """One continuation as it grows."""

    def __init__(
        self, prompt: int, number: int, ids: list[int], common: int, draws: Float[Tensor, " new"]
    ) -> None:
        self.prompt, self.number, self.draws = prompt, number, draws
        self.pending = ids[common:]
        self.written: list[int] = []
        self.done = False


def _run(
    model: Model,
    rows: Sequence[_Row],
    cache: Any,
    common: int,
    n_new: int,
    sampling: Sampling,
    ends: Callable[[str], bool] | None,
) -> None:
    """Feed the rows' prompts, then draw until all are done.

    Args:
        model: The model.
        rows: In this forward.
        cache: Keys and values of what they have in common, one copy each; None where that is nothing.
        common: Tokens that they have in common.
        n_new: Tokens a row may write.
        sampling: How.
        ends: See `continuations`.
    """
    special = set(model.tokenizer.all_special_ids)
    live = list(rows)
    at_once = min(len(row.pending) for row in live)
    fed = torch.tensor([row.pending[:at_once] for row in live])
    for row in live:
        row.pending = row.pending[at_once:]
    while True:
        result = _read(model, fed, cache)
        cache = result.past_key_values
        logits = result.logits[:, -1].float().cpu()
        drawing = [i for i, row in enumerate(live) if not row.pending and not row.done]
        if drawing:
            draws = torch.stack([live[i].draws[len(live[i].written)] for i in drawing])
            for i, token in zip(drawing, _drawn(logits[drawing], draws, sampling).tolist(), strict=True):
                _take(model, live[i], token, special, n_new, ends)
        left = [i for i, row in enumerate(live) if not row.done]
        if not left:
            return
        if len(left) <= 0.75 * len(live):
            cache.batch_select_indices(torch.tensor(left, device=model.device))
            live = [live[i] for i in left]
        fed = torch.tensor([[row.pending.pop(0) if row.pending else _latest(row)] for row in live])


def _latest(row: _Row) -> int:
    """What a row reads next: its last token; anything where it is done and only waits for the others."""
    return row.written[-1] if row.written else 0


def _take(
    model: Model, row: _Row, token: int, special: set[int], n_new: int, ends: Callable[[str], bool] | None
) -> None:
    """Give a row its next token, or end it."""
    if row.done:
        return
    if token in special:
        row.done = True
        return
    row.written.append(token)
    row.done = len(row.written) == n_new
    if ends is not None and len(row.written) % 8 == 0 and not row.done:
        row.done = ends(str(model.tokenizer.decode(row.written)))


def _read(model: Model, ids: Int64[Tensor, "row pos"], cache: Any) -> Any:
    """One forward with keys and values kept; of the logits, the last position's."""
    return model.module(
        input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )


def _copied(cache: Any, n: int) -> Any:
    """The cache of one row, for `n` rows."""
    if cache is None:
        return None
    import copy

    twin = copy.deepcopy(cache)
    twin.batch_repeat_interleave(n)
    return twin


def _drawn(
    logits: Float[Tensor, "row d_vocab"], draws: Float[Tensor, " row"], sampling: Sampling
) -> Int64[Tensor, " row"]:
    """One token a row, by inverting the cumulative distribution of the nucleus at a number between 0 and 1."""
    top, ids = (logits / sampling.temperature).topk(min(CANDIDATES, logits.shape[-1]))
    everything = (logits / sampling.temperature).logsumexp(-1, keepdim=True)
    probs = (top - everything).exp()
    before = probs.cumsum(-1) - probs
    probs = torch.where(before < sampling.top_p, probs, 0.0)  # the likeliest token has nothing before it
    below = probs.cumsum(-1)
    chosen = (below < draws[:, None] * below[:, -1:]).sum(-1).clamp_max(probs.shape[-1] - 1)
    return ids[torch.arange(len(ids)), chosen]


def _draws(sampling: Sampling, prompt: Sequence[int], number: int, n_new: int) -> Float[Tensor, " new"]:
    """The numbers that one continuation is drawn by, whatever the batch."""
    stream = "sampling " + " ".join(map(str, prompt))
    return torch.rand(n_new, generator=generator(sampling.seed, stream, number))


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; at least one of each is left to feed."""
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if len({prompt[i] for prompt in prompts}) > 1), most)
