"""Forwards with a value delta added to one module's output at one token of each row, begun at that token.

A search for a value delta runs the same rows again and again. Nothing before that token changes in any layer, and
nothing at all in the layers below: keys and values of the tokens before are kept, and so is the stream from the
token on, so that each forward only takes those few tokens through the layers above. Where a model does not come
out the same this way (its blocks exchange more than the stream, keys and values), its rows are run whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from editors.key_value.key_positions import KeyRow, batch_of, grouped
from locus.forward import Batch, label_logits
from locus.hooks import HookFunction, patched, record, record_results, skipped
from locus.model import Model

EXACT = 1e-3
"""Logits may differ so much, as a share of their spread, in float32 and wider; in narrower dtypes fifty times that."""

TRIED = 8
"""Rows on which that is tried."""
PADDED = 1.5
"""The longest row of a forward may be so many times as long as its shortest, counted from the positions on."""
FEW = 64
"""Unless a forward has fewer tokens than this: it costs about the same for so few."""

DeltaForwards = Callable[
    [Sequence[int], Float[Tensor, "key d_model"]], Iterator[tuple[Batch, Float[Tensor, "label d_vocab"]]]
]
"""Indices of rows, and the value deltas of all keys -> the rows' logits, some rows at a time."""


def delta_forwards(model: Model, site: str, rows: Sequence[KeyRow], batch_tokens: int) -> DeltaForwards:
    """Forwards of these rows with a value delta added to the output of the module `site` at each row's position."""
    return SuffixForwards.of(model, site, rows, batch_tokens) or WholeForwards(
        model, site, rows, batch_tokens
    )


@dataclass(frozen=True, eq=False)
class WholeForwards:
    """Every row from its first token and the first layer on."""

    model: Model
    site: str
    rows: Sequence[KeyRow]
    batch_tokens: int

    def __call__(
        self, due: Sequence[int], delta: Float[Tensor, "key d_model"]
    ) -> Iterator[tuple[Batch, Float[Tensor, "label d_vocab"]]]:
        for chosen in grouped([self.rows[i] for i in due], self.batch_tokens):
            group = [due[i] for i in chosen]
            at = torch.tensor([self.rows[i].position for i in group])
            batch = batch_of(self.rows, group)
            with patched(self.model.module, outputs={self.site: _adding(delta, self.rows, group, at)}):
                logits = label_logits(self.model, batch)
            yield batch, logits


@dataclass(frozen=True, eq=False)
class _Kept:
    """What stays the same of some rows, whatever the value delta."""

    ids: Int64[Tensor, "row after"]
    """From the position on, padded on the right."""
    starts: Int64[Tensor, " row"]
    """The position, which is also how many tokens stand before it."""
    lengths: Int64[Tensor, " row"]
    """Tokens from the position on, but for the last, after which nothing is asked."""
    stream: Sequence[Float[Tensor, "row after d_model"]]
    """What comes out of the last block that is skipped, padded on the right; none where none is."""
    before: Sequence[Float[Tensor, "row head before d_head"]]
    """Keys and values of the tokens before, of every layer that is not skipped, padded on the left."""

    @classmethod
    def together(cls, parts: Sequence[_Kept], order: Int64[Tensor, " row"]) -> _Kept:
        """Those of several groups as one, in another order."""

        def merged(tensors: Sequence[Tensor], dim: int, left: bool) -> Tensor:
            width = max(one.shape[dim] for one in tensors)
            wide = [_padded(one, width, dim, left) for one in tensors]
            return torch.cat(wide)[order.to(wide[0].device)]

        return cls(
            merged([one.ids for one in parts], 1, False),
            torch.cat([one.starts for one in parts])[order],
            torch.cat([one.lengths for one in parts])[order],
            [merged(tensors, 1, False) for tensors in zip(*(one.stream for one in parts), strict=True)],
            [merged(tensors, 2, True) for tensors in zip(*(one.before for one in parts), strict=True)],
        )


@dataclass(frozen=True, eq=False)
class SuffixForwards:
    """Every row from its position and that module's block on."""

    model: Model
    site: str
    rows: Sequence[KeyRow]
    batch_tokens: int
    below: Sequence[str]
    """Blocks that are skipped."""
    in_tuple: frozenset[str]
    """Those of them that return a tuple."""
    kept: _Kept

    @classmethod
    def of(cls, model: Model, site: str, rows: Sequence[KeyRow], batch_tokens: int) -> SuffixForwards | None:
        """Run every row once and keep what stays the same; None if the model does not come out the same that way."""
        blocks = model.atlas.blocks
        block = next(i for i, path in enumerate(blocks) if f"{site}.".startswith(f"{path}."))
        below = blocks[: block + 1] if site == blocks[block] else blocks[:block]
        in_tuple: set[str] = set()
        groups = grouped(rows, batch_tokens)
        parts: list[_Kept] = []
        logits: dict[int, Tensor] = {}
        for group in groups:
            batch = batch_of(rows, group)
            with record_results(model.module, below) as results:
                found = _recorded(model, batch, torch.tensor([rows[i].position for i in group]), below)
            if found is None:
                return None
            in_tuple |= {name for name, result in results.items() if isinstance(result, tuple)}
            parts.append(found[0])
            logits |= _by_row(batch, found[1])
        order = torch.tensor([i for group in groups for i in group]).argsort()
        kept = _Kept.together(parts, order)
        made = cls(model, site, rows, batch_tokens, below, frozenset(in_tuple), kept)
        return made if made._agrees(logits) else None

    @torch.no_grad()
    def _agrees(self, then: Mapping[int, Float[Tensor, "label d_vocab"]]) -> bool:
        """Whether forwards of some rows, with few and with many tokens before and no value delta, give these logits."""
        narrow = 1 if self.model.dtype in (torch.float32, torch.float64) else 50
        still = torch.zeros(max(one.owner for one in self.rows) + 1, self.model.atlas.d_model)
        order = sorted(then, key=lambda i: int(self.kept.starts[i]))
        some = {order[i * (len(order) - 1) // (TRIED - 1)] for i in range(TRIED)}
        for batch, logits in self(sorted(some), still):
            for i, now in _by_row(batch, logits).items():
                spread = (then[i] - then[i].mean(-1, keepdim=True)).norm()
                if not bool((now - then[i]).norm() <= EXACT * narrow * spread):
                    return False
        return True

    def __call__(
        self, due: Sequence[int], delta: Float[Tensor, "key d_model"]
    ) -> Iterator[tuple[Batch, Float[Tensor, "label d_vocab"]]]:
        for group in _alike(due, self.kept, self.batch_tokens):
            yield self._forward(group, delta)

    def _forward(
        self, group: Sequence[int], delta: Float[Tensor, "key d_model"]
    ) -> tuple[Batch, Float[Tensor, "label d_vocab"]]:
        kept, device = self.kept, self.model.device
        starts, lengths = kept.starts[group], kept.lengths[group]
        width, before = int(lengths.max()), int(starts.max())
        after = (torch.arange(width) < lengths[:, None]).long()
        whole = batch_of(self.rows, group)
        batch = replace(
            whole, ids=kept.ids[group, :width], attention_mask=after, cols=whole.cols - starts[whole.rows]
        )
        nothing = torch.zeros(1, 1, before, 1)  # whoever asks how long the cache is asks its first layer
        held = [tensor[group, :, tensor.shape[2] - before :] for tensor in kept.before]
        more: dict[str, Any] = {
            "past_key_values": _cache([nothing] * 2 * len(self.below) + held),
            "use_cache": True,
            "attention_mask": torch.cat([_left(starts, before), after], dim=1).to(device),
        }
        if "position_ids" in inspect.signature(self.model.module.forward).parameters:
            more["position_ids"] = (starts[:, None] + torch.arange(width)).to(device)
        results: dict[str, Any] = {}
        for stream in kept.stream:
            part = stream[group, :width]
            results = {name: (part, None) if name in self.in_tuple else part for name in self.below}
        add = _adding(delta, self.rows, group, torch.zeros_like(starts))
        with skipped(self.model.module, results), patched(self.model.module, outputs={self.site: add}):
            return batch, label_logits(self.model, batch, **more)


def _alike(due: Sequence[int], kept: _Kept, batch_tokens: int) -> list[list[int]]:
    """Rows in groups of about as many tokens each, no more of them than would fit a forward whole: each has its
    logits."""
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(due, key=lambda i: (int(kept.lengths[i]), i)):
        last, length, whole = (
            groups[-1] if groups else [],
            int(kept.lengths[i]),
            int(kept.lengths[i] + kept.starts[i]),
        )
        longest = max(longest, whole)
        fits = last and (len(last) + 1) * longest <= batch_tokens
        few = length * len(last) < FEW
        if fits and (few or length <= PADDED * int(kept.lengths[last[0]])):
            last.append(i)
        else:
            groups.append([i])
            longest = whole
    return groups


def _by_row(batch: Batch, logits: Float[Tensor, "label d_vocab"]) -> dict[int, Float[Tensor, "_ d_vocab"]]:
    return {i: logits[batch.example == i] for i in batch.examples}


def _adding(
    delta: Float[Tensor, "key d_model"],
    rows: Sequence[KeyRow],
    group: Sequence[int],
    at: Int64[Tensor, " member"],
) -> HookFunction:
    """A patch that adds the value deltas of a group's keys, at these positions."""
    return partial(_add, delta[[rows[i].owner for i in group]], at)


def _add(
    deltas: Float[Tensor, "member d_model"],
    at: Int64[Tensor, " member"],
    output: Float[Tensor, "member pos d_model"],
) -> Float[Tensor, "member pos d_model"]:
    where = (torch.arange(len(at), device=output.device), at.to(output.device))
    return output.index_put(where, deltas.to(output), accumulate=True)


@torch.no_grad()
def _recorded(
    model: Model, batch: Batch, starts: Int64[Tensor, " member"], below: Sequence[str]
) -> tuple[_Kept, Float[Tensor, "label d_vocab"]] | None:
    """One whole forward of a group: what to keep of it, and its logits. None where the model keeps no keys."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with record(model.module, outputs=below[-1:]) as seen:
        logits = label_logits(model, batch, past_key_values=cache, use_cache=True)
    held: list[Any] = [getattr(one, name, None) for one in cache.layers for name in ("keys", "values")]
    if len(held) != 2 * model.atlas.n_layers or not all(
        isinstance(t, Tensor) and t.dim() == 4 and (t.shape[0], t.shape[2]) == tuple(batch.ids.shape)
        for t in held
    ):
        return None
    lengths = batch.attention_mask.sum(1) - starts - 1
    before = [_before(tensor, starts) for tensor in held[2 * len(below) :]]
    stream = [_after(seen.outputs[name], starts, lengths) for name in below[-1:]]
    ids = _after(batch.ids[:, :, None], starts, lengths)[:, :, 0]
    return _Kept(ids, starts, lengths, stream, before), logits


def _before(tensor: Float[Tensor, "member head pos d"], starts: Int64[Tensor, " member"]) -> Tensor:
    """What stands before each row's start, moved to the right end of a common width."""
    width = int(starts.max())
    at = (torch.arange(width) - width + starts[:, None]).clamp_min(0).to(tensor.device)
    return tensor.gather(2, at[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _after(tensor: Tensor, starts: Int64[Tensor, " member"], lengths: Int64[Tensor, " member"]) -> Tensor:
    """What stands from each row's start on, `member pos d`, moved to the left end of a common width."""
    at = starts[:, None] + torch.arange(int(lengths.max()))
    at = at.clamp_max(tensor.shape[1] - 1).to(tensor.device)
    return tensor.gather(1, at[:, :, None].expand(-1, -1, tensor.shape[2]))


def _padded(tensor: Tensor, width: int, dim: int, left: bool) -> Tensor:
    """With zeros up to a width, on the left or on the right."""
    shape = list(tensor.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor][:: 1 if left else -1], dim=dim)


def _left(starts: Int64[Tensor, " member"], width: int) -> Int64[Tensor, "member width"]:
    """1 on the tokens before each row's start, at the right end of a common width."""
    return (torch.arange(width) >= width - starts[:, None]).long()


def _cache(before: Sequence[Tensor]) -> Any:
    """A cache of transformers' that holds these keys and values, keys before values, layer by layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(before) // 2):
        cache.update(before[2 * layer], before[2 * layer + 1], layer)
    return cache
