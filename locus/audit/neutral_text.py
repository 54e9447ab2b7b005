"""Is it still the same model elsewhere: perplexity and KL(base || edited) per token on neutral text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from locus.audit.intervals import Items
from locus.audit.state import State
from locus.forward import Batch, batches, label_logits
from locus.metrics import kl_divergence
from locus.model import Model
from locus.parallel.map import each, n_processes
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
    base = states[0]
    size = 4 * base.model.atlas.d_vocab
    max_tokens = max(1, min(max_tokens, max_bytes // size))
    cut = batches(text, max_tokens)
    if n_processes() > 1:  # as many groups as processes, at least: to the numbers it makes no difference
        max_bytes = min(max_bytes, size * -(-sum(len(batch.labels) for batch in cut) // n_processes()))
    groups = list(_groups(cut, size, max_bytes))
    found = list(each(groups, partial(_read_group, states), "neutral text"))
    owners = [int(i) for group in groups for batch in group for i in batch.example]
    paragraphs = tuple(f"paragraph {i}" for i in owners)
    nll, kl = (
        torch.cat([piece[half] for piece in found], 1) if found else torch.zeros(len(states), 0)
        for half in range(2)
    )
    return {state.name: TextScores(paragraphs, nll[i], kl[i]) for i, state in enumerate(states)}


def _read_group(
    states: Sequence[State], group: Sequence[Batch]
) -> tuple[Float[Tensor, "state token"], Float[Tensor, "state token"]]:
    """NLL and KL of every token of some batches, under every state."""
    base, *others = states
    with base.active() as model:
        cached = [_logprobs(model, batch) for batch in group]
    nll = [torch.cat([_nll(logprobs, batch) for logprobs, batch in zip(cached, group, strict=True)])]
    kl = [torch.zeros_like(nll[0])]
    for state in others:
        own: list[tuple[Tensor, Tensor]] = []
        with state.active() as model:
            for batch, before in zip(group, cached, strict=True):
                after = _logprobs(model, batch)
                distance = kl_divergence(before.to(after.device), after).cpu()
                own.append((_nll(after, batch), _finite(distance)))
        nll.append(torch.cat([one for one, _ in own]))
        kl.append(torch.cat([one for _, one in own]))
    return torch.stack(nll), torch.stack(kl)


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
