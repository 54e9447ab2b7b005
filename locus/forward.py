"""Batched teacher-forced passes: the logits of the target tokens, and nothing that nobody asked for.

Examples of unequal length share a batch by padding on the right: a causal model's earlier positions do not
see what stands behind them, so the padding changes nothing, whatever the position scheme. The unembedding,
the widest product of a small model, runs only at the positions that predict a target token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.hooks import patched
from locus.metrics import token_nll
from locus.tokens import Encoded, encode

if TYPE_CHECKING:
    from locus.fact import Example, Fact
    from locus.model import Model


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, and the places where their targets are predicted."""

    ids: Int[Tensor, "batch pos"]
    """Token ids; padding repeats id 0."""
    attention_mask: Int[Tensor, "batch pos"]
    """1 on tokens, 0 on padding."""
    rows: Int[Tensor, " label"]
    """Row of each target token."""
    cols: Int[Tensor, " label"]
    """Position whose logits predict that token: one before it."""
    labels: Int[Tensor, " label"]
    """The target token itself."""
    example: Int[Tensor, " label"]
    """Index of its example in the caller's list."""
    examples: tuple[int, ...]
    """Index in the caller's list of each row."""
    ends: Bool[Tensor, " label"]
    """Whether the label ends the model's turn: it counts in likelihoods, not in whether the answer is right."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            ids=self.ids.to(device),
            attention_mask=self.attention_mask.to(device),
            rows=self.rows.to(device),
            cols=self.cols.to(device),
            labels=self.labels.to(device),
            example=self.example.to(device),
            examples=self.examples,
            ends=self.ends.to(device),
        )


@dataclass(frozen=True)
class TargetScores:
    """What a model gives to the target of each example, teacher-forced."""

    nll: Float[Tensor, " example"]
    """Negative log-likelihood, summed over the target's tokens, in nats; in a conversation the end of turn is one."""
    n_tokens: Int[Tensor, " example"]
    """Tokens of the target, the end of turn among them."""
    correct: Bool[Tensor, " example"]
    """Whether every token of the target, the end of turn aside, is the model's first choice."""
    first_prob: Float[Tensor, " example"]
    """Probability of the target's first token."""

    @property
    def prob(self) -> Float[Tensor, " example"]:
        """Probability of the whole target."""
        return (-self.nll).exp()


def collate(encoded: Sequence[Encoded], examples: Sequence[int]) -> Batch:
    """Pad `encoded[i]` for i in `examples` on the right into one batch, on the CPU."""
    chosen = [encoded[i] for i in examples]
    width = max(len(e.ids) for e in chosen)
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    mask = torch.zeros(len(chosen), width, dtype=torch.long)
    rows, cols, labels, owner, ends = [], [], [], [], []
    for row, (index, one) in enumerate(zip(examples, chosen, strict=True)):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        mask[row, : len(one.ids)] = 1
        for position in range(one.target_start, len(one.ids)):
            rows.append(row)
            cols.append(position - 1)
            labels.append(one.ids[position])
            owner.append(index)
            ends.append(position >= len(one.ids) - one.n_end)
    return Batch(
        ids=ids,
        attention_mask=mask,
        rows=torch.tensor(rows, dtype=torch.long),
        cols=torch.tensor(cols, dtype=torch.long),
        labels=torch.tensor(labels, dtype=torch.long),
        example=torch.tensor(owner, dtype=torch.long),
        examples=tuple(examples),
        ends=torch.tensor(ends, dtype=torch.bool),
    )


MOST_PADDING = 64
"""Tokens of padding in a batch; to run that many more costs about as much as to run another batch."""


def batches(encoded: Sequence[Encoded], max_tokens: int = 4096) -> list[Batch]:
    """Cut a list of examples into batches of at most `max_tokens` tokens, MOST_PADDING of them padding.

    A batch has at least one example. Examples are sorted by length so that little is padding; `Batch.example` leads
    back to the caller's order.
    """
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), i))
    groups: list[list[int]] = []
    asked = 0
    for index in order:
        length = len(encoded[index].ids)
        padded = (len(groups[-1]) + 1) * length if groups else 0
        asked += length
        if groups and padded <= max_tokens and padded - asked <= MOST_PADDING:
            groups[-1].append(index)
        else:
            groups.append([index])
            asked = length
    return [collate(encoded, group) for group in groups]


def label_logits(model: Model, batch: Batch, **more: Any) -> Float[Tensor, "label d_vocab"]:
    """Logits at the positions that predict a target token, in float32, differentiable.

    The model runs as it is; before its unembedding the other positions are dropped, so that soft-capping
    and scaling behind it still apply and no [batch, position, vocabulary] tensor is ever made.

    Args:
        model: Left as it is.
        batch: What to run.
        more: Other arguments of the model's forward: a cache, a mask that covers it.
    """
    batch = batch.to(model.device)
    keep_labelled = {model.atlas.unembed: lambda hidden: _labelled(batch, hidden).unsqueeze(0)}
    with patched(model.module, inputs=keep_labelled):
        given = {"attention_mask": batch.attention_mask, "use_cache": False} | more
        logits = model.module(input_ids=batch.ids, **given).logits
    chosen: Tensor = logits[0].float()
    return chosen


def label_states(model: Model, batch: Batch) -> Float[Tensor, "label d_model"]:
    """What the unembedding reads at the positions that predict a target token, in the model's dtype."""
    batch = batch.to(model.device)
    kept: list[Tensor] = []
    take = partial(_take_labelled, batch, kept)
    with patched(model.module, inputs={model.atlas.unembed: take}):
        model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
    return kept[0]


def _labelled(batch: Batch, hidden: Float[Tensor, "batch pos d"]) -> Float[Tensor, "label d"]:
    return hidden[batch.rows.to(hidden.device), batch.cols.to(hidden.device)]


def _take_labelled(
    batch: Batch, into: list[Tensor], hidden: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "1 1 d"]:
    """Keep what is labelled; the unembedding is left with one position."""
    into.append(_labelled(batch, hidden))
    return hidden[:1, :1]


def unembedded(model: Model, states: Float[Tensor, "label d_model"]) -> Float[Tensor, "label d_vocab"]:
    """Logits of what `label_states` gave, in float32, with all that the model does behind its unembedding.

    It costs the unembedding and a forward of one token, in whose place the states are read.
    """
    with patched(model.module, inputs={model.atlas.unembed: lambda h: states.to(h.device).unsqueeze(0)}):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits: Tensor = model.module(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def head_logits(model: Model, states: Float[Tensor, "label d_model"]) -> Float[Tensor, "label d_vocab"]:
    """What the unembedding alone makes of them, in float32."""
    head = model.module.get_submodule(model.atlas.unembed)
    logits: Tensor = head(states.to(model.device).unsqueeze(0))[0].float()
    return logits


def label_nll(logits: Float[Tensor, "label d_vocab"], batch: Batch) -> Float[Tensor, " label"]:
    """Negative log-likelihood of each target token, in nats."""
    return token_nll(logits, batch.labels)


def example_sum(values: Float[Tensor, " label"], batch: Batch) -> Float[Tensor, " row"]:
    """Sum a per-token value over each example's target; one value for each row of the batch."""
    return values.new_zeros(len(batch.examples)).index_add(0, batch.rows.to(values.device), values)


@torch.no_grad()
def measure(
    model: Model, examples: Sequence[Example | Fact | Encoded], max_tokens: int = 4096
) -> TargetScores:
    """Score the target of each example in batched forward passes; results are in the caller's order.

    Raises:
        InputError: an example that cannot be encoded (see `locus.tokens.encode`), or a result that is not
            a number.
    """
    encoded = [e if isinstance(e, Encoded) else encode(model, e) for e in examples]
    n = len(encoded)
    nll, first = torch.zeros(n), torch.zeros(n)
    correct = torch.ones(n, dtype=torch.bool)
    for batch in batches(encoded, max_tokens):
        logits = label_logits(model, batch)
        per_token = label_nll(logits, batch).cpu()
        nll.index_add_(0, batch.example, per_token)
        hit = logits.argmax(-1).cpu() == batch.labels
        correct[batch.example[~hit & ~batch.ends]] = False
        starts = torch.tensor([encoded[int(i)].target_start - 1 for i in batch.example], dtype=torch.long)
        is_first = batch.cols == starts
        first[batch.example[is_first]] = (-per_token[is_first]).exp()
    return TargetScores(nll, torch.tensor([e.n_target for e in encoded], dtype=torch.long), correct, first)
