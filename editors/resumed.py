"""Forwards with one module's output shifted at one token of each row, begun where the shift is.

A search for a shift asks the same rows again and again. Nothing before the shifted token changes in any layer, and
nothing at all in the layers below: keys and values of the tokens before are kept, and so is the stream from the
token on, so that each forward only takes those few tokens through the layers above. Where a model does not come
out the same this way (its blocks exchange more than the stream, keys and values), its rows are run whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from editors.subject import Row, batch_of, grouped
from locus.forward import Batch, label_logits
from locus.hooks import Patch, patched, record, record_results, skipped
from locus.model import Model

EXACT = 1e-3
"""Logits may differ so much, as a share of their spread, in float32 and wider; in narrower dtypes fifty times that."""

PADDED = 2.0
"""A group's longest row may be so many times as long as its shortest, counted from the positions on."""
SMALL = 64
"""Unless the group has fewer tokens than this: a forward costs about the same for so few."""

Shifted = Callable[
    [Sequence[int], Float[Tensor, "fact d_model"]], Iterator[tuple[Batch, Float[Tensor, "label d_vocab"]]]
]
"""Indices of rows, and the shifts of all facts -> the rows' logits, some rows at a time."""


def shifted(model: Model, site: str, rows: Sequence[Row], batch_tokens: int) -> Shifted:
    """Forwards of these rows with the output of the module `site` shifted at each row's position."""
    return Resumed.of(model, site, rows, batch_tokens) or Whole(model, site, rows, batch_tokens)


@dataclass(frozen=True, eq=False)
class Whole:
    """Every row from its first token and the first layer on."""

    model: Model
    site: str
    rows: Sequence[Row]
    batch_tokens: int

    def __call__(
        self, due: Sequence[int], shift: Float[Tensor, "fact d_model"]
    ) -> Iterator[tuple[Batch, Float[Tensor, "label d_vocab"]]]:
        for chosen in grouped([self.rows[i] for i in due], self.batch_tokens):
            group = [due[i] for i in chosen]
            at = torch.tensor([self.rows[i].position for i in group])
            batch = batch_of(self.rows, group)
            with patched(self.model.module, outputs={self.site: _adding(shift, self.rows, group, at)}):
                yield batch, label_logits(self.model, batch)


@dataclass(frozen=True, eq=False)
class _Kept:
    """What stays the same of a group of rows, whatever the shift."""

    group: Sequence[int]
    ids: Int64[Tensor, "member after"]
    """From the position on, padded on the right."""
    starts: Int64[Tensor, " member"]
    """The position, which is also how many tokens stand before it."""
    lengths: Int64[Tensor, " member"]
    """Tokens from the position on, but for the last, behind which nothing is asked."""
    stream: Float[Tensor, "member after d_model"] | None
    """What comes out of the last block that is skipped; None where none is."""
    before: Sequence[tuple[Tensor, Tensor]]
    """By layer that is not skipped: keys and values of the tokens before, `member head before d_head`, padded on the
    left."""


@dataclass(frozen=True, eq=False)
class Resumed:
    """Every row from its position and the shifted module's block on."""

    model: Model
    site: str
    rows: Sequence[Row]
    below: Sequence[str]
    """Blocks that are skipped."""
    in_tuple: frozenset[str]
    """Those of them that return a tuple."""
    kept: Sequence[_Kept]

    @classmethod
    def of(cls, model: Model, site: str, rows: Sequence[Row], batch_tokens: int) -> Resumed | None:
        """Run every row once and keep what stays the same; None if the model does not come out the same that way."""
        blocks = model.atlas.blocks
        block = next(i for i, path in enumerate(blocks) if f"{site}.".startswith(f"{path}."))
        below = blocks[: block + 1] if site == blocks[block] else blocks[:block]
        in_tuple: set[str] = set()
        kept, logits = [], {}
        for group in _alike(rows, batch_tokens):
            found = _recorded(model, rows, group, below, in_tuple)
            if found is None:
                return None
            kept.append(found[0])
            logits[tuple(group)] = found[1]
        made = cls(model, site, rows, below, frozenset(in_tuple), kept)
        return made if made._agrees(logits) else None

    @torch.no_grad()
    def _agrees(self, logits: dict[tuple[int, ...], Tensor]) -> bool:
        """Whether an unshifted forward gives these logits."""
        narrow = 1 if self.model.dtype in (torch.float32, torch.float64) else 50
        still = torch.zeros(max((one.fact for one in self.rows), default=0) + 1, self.model.atlas.d_model)
        for batch, now in self(range(len(self.rows)), still):
            then = logits[batch.examples]
            spread = (then - then.mean(-1, keepdim=True)).norm()
            if not bool((now - then).norm() <= EXACT * narrow * spread):
                return False
        return True

    def __call__(
        self, due: Sequence[int], shift: Float[Tensor, "fact d_model"]
    ) -> Iterator[tuple[Batch, Float[Tensor, "label d_vocab"]]]:
        wanted = set(due)
        for kept in self.kept:
            members = [m for m, i in enumerate(kept.group) if i in wanted]
            if members:
                yield self._forward(kept, members, shift)

    def _forward(
        self, kept: _Kept, members: Sequence[int], shift: Float[Tensor, "fact d_model"]
    ) -> tuple[Batch, Float[Tensor, "label d_vocab"]]:
        group = [kept.group[m] for m in members]
        starts, lengths = kept.starts[members], kept.lengths[members]
        width, before = int(lengths.max()), int(starts.max())
        ids = kept.ids[members, :width]
        after = (torch.arange(width) < lengths[:, None]).long()
        nothing = torch.zeros(1, 1, before, 1)  # whoever asks how long the cache is asks its first layer
        held = [(_last(k[members], before), _last(v[members], before)) for k, v in kept.before]
        cache = _cache([(nothing, nothing)] * len(self.below) + held)
        whole = batch_of(self.rows, group)
        batch = replace(whole, ids=ids, attention_mask=after, cols=whole.cols - starts[whole.rows])
        device = self.model.device
        more: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        more["attention_mask"] = torch.cat([_left(starts, before), after], dim=1).to(device)
        if "position_ids" in inspect.signature(self.model.module.forward).parameters:
            more["position_ids"] = (starts[:, None] + torch.arange(width)).to(device)
        results: dict[str, Any] = {}
        if kept.stream is not None:
            stream = kept.stream[members, :width]
            results = {name: (stream, None) if name in self.in_tuple else stream for name in self.below}
        add = _adding(shift, self.rows, group, torch.zeros_like(starts))
        with skipped(self.model.module, results), patched(self.model.module, outputs={self.site: add}):
            return batch, label_logits(self.model, batch, **more)


def _alike(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Indices of rows in groups with about as many tokens behind their positions, that fit a whole forward."""
    after = [len(one.encoded.ids) - one.position for one in rows]
    groups: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(rows)), key=lambda i: (after[i], len(rows[i].encoded.ids), i)):
        longest = max(longest, len(rows[i].encoded.ids))
        few = groups and after[i] * len(groups[-1]) < SMALL
        fits = groups and (len(groups[-1]) + 1) * longest <= batch_tokens
        if fits and (few or after[i] <= PADDED * after[groups[-1][0]]):
            groups[-1].append(i)
        else:
            groups.append([i])
            longest = len(rows[i].encoded.ids)
    return groups


def _adding(
    shift: Float[Tensor, "fact d_model"],
    rows: Sequence[Row],
    group: Sequence[int],
    at: Int64[Tensor, " member"],
) -> Patch:
    """A patch that adds the shifts of a group's facts, at these positions."""
    shifts = shift[[rows[i].fact for i in group]]

    def add(output: Tensor) -> Tensor:
        where = (torch.arange(len(at), device=output.device), at.to(output.device))
        return output.index_put(where, shifts.to(output), accumulate=True)

    return add


@torch.no_grad()
def _recorded(
    model: Model, rows: Sequence[Row], group: Sequence[int], below: Sequence[str], in_tuple: set[str]
) -> tuple[_Kept, Tensor] | None:
    """One whole forward of a group: what to keep of it, and its logits. None where the model keeps no keys."""
    from transformers import DynamicCache

    cache = DynamicCache()
    batch = batch_of(rows, group)
    outputs = below[-1:]
    with record(model.module, outputs=outputs) as seen, record_results(model.module, below) as results:
        logits = label_logits(model, batch, past_key_values=cache, use_cache=True)
    in_tuple |= {name for name, result in results.items() if isinstance(result, tuple)}
    starts = torch.tensor([rows[i].position for i in group])
    lengths = batch.attention_mask.sum(1) - starts - 1
    held: list[tuple[Any, Any]] = [
        (getattr(one, "keys", None), getattr(one, "values", None)) for one in cache.layers
    ]
    if len(held) != model.atlas.n_layers or not all(
        isinstance(t, Tensor) and t.dim() == 4 and (t.shape[0], t.shape[2]) == tuple(batch.ids.shape)
        for pair in held
        for t in pair
    ):
        return None
    before = [(_before(keys, starts), _before(values, starts)) for keys, values in held[len(below) :]]
    stream = _after(seen.outputs[outputs[0]], starts, lengths) if outputs else None
    ids = _after(batch.ids[:, :, None], starts, lengths)[:, :, 0]
    return _Kept(group, ids, starts, lengths, stream, before), logits


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


def _last(tensor: Float[Tensor, "member head pos d"], width: int) -> Tensor:
    return tensor[:, :, tensor.shape[2] - width :]


def _left(starts: Int64[Tensor, " member"], width: int) -> Int64[Tensor, "member width"]:
    """1 on the tokens before each row's start, at the right end of a common width."""
    return (torch.arange(width) >= width - starts[:, None]).long()


def _cache(before: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A cache of transformers' that holds these keys and values, layer by layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(before):
        cache.update(keys, values, layer)
    return cache
