"""Is it still the same model elsewhere: perplexity and KL(base || edited) per token on neutral text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locus.audit.interval import Items
from locus.audit.state import State
from locus.forward import Batch, batches, label_logits
from locus.metrics import kl_divergence
from locus.model import Model
from locus.progress import task
from locus.tokens import Encoded


@dataclass(frozen=True)
class TextScores:
    """One model state on neutral text, token by token."""

    paragraphs: tuple[str, ...]
    """Paragraph of each token: what is resampled for intervals."""
    nll: Float[Tensor, " token"]
    """In nats; infinite where the model gave no number."""
    kl: Float[Tensor, " token"]
    """KL(base || this state) in nats, over the whole vocabulary; 0 for the base."""

    @property
    def nll_items(self) -> Items:
        """NLL per token."""
        return Items(self.paragraphs, self.nll)

    @property
    def kl_items(self) -> Items:
        """KL per token."""
        return Items(self.paragraphs, self.kl)


@torch.no_grad()
def read_text(
    states: Sequence[State], text: Sequence[Encoded], max_tokens: int = 1024, max_bytes: int = 1 << 30
) -> dict[str, TextScores]:
    """Score the text under every state; the first state is the base that the others are compared with.

    The base's log-probabilities are kept for as many batches as fit in `max_bytes`, then every other
    state reads those batches: one forward a state and token, bounded memory, one set of weights.
    """
    base, *others = states
    size = 4 * base.model.atlas.d_vocab
    max_tokens = max(1, min(max_tokens, max_bytes // size))
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {state.name: [] for state in states}
    owners: list[int] = []
    with task("neutral text", total=len(text) * len(states)) as line:
        for group in _groups(batches(text, max_tokens), size, max_bytes):
            owners += [int(i) for batch in group for i in batch.example]
            with base.active() as model:
                cached = [_logprobs(model, batch) for batch in group]
            for batch, logprobs in zip(group, cached, strict=True):
                columns[base.name].append((_nll(logprobs, batch), torch.zeros(len(batch.labels))))
            line.advance(sum(len(batch.examples) for batch in group))
            for state in others:
                with state.active() as model:
                    for batch, before in zip(group, cached, strict=True):
                        after = _logprobs(model, batch)
                        kl = kl_divergence(before.to(after.device), after).cpu()
                        columns[state.name].append((_nll(after, batch), _finite(kl)))
                line.advance(sum(len(batch.examples) for batch in group))
    paragraphs = tuple(f"paragraph {i}" for i in owners)
    return {
        name: TextScores(paragraphs, torch.cat([nll for nll, _ in parts]), torch.cat([kl for _, kl in parts]))
        for name, parts in columns.items()
    }


def _logprobs(model: Model, batch: Batch) -> Float[Tensor, "label d_vocab"]:
    return label_logits(model, batch).log_softmax(-1)


def _nll(logprobs: Float[Tensor, "label d_vocab"], batch: Batch) -> Float[Tensor, " label"]:
    return _finite(-logprobs.gather(-1, batch.labels.to(logprobs.device)[:, None])[:, 0].cpu())


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isnan(values), torch.inf, values).clamp_min(0)


def _groups(all_batches: Sequence[Batch], bytes_per_token: int, max_bytes: int) -> Iterator[list[Batch]]:
    """Consecutive batches whose log-probabilities fit in `max_bytes` together."""
    group: list[Batch] = []
    held = 0
    for batch in all_batches:
        need = len(batch.labels) * bytes_per_token
        if group and held + need > max_bytes:
            yield group
            group, held = [], 0
        group.append(batch)
        held += need
    if group:
        yield group
