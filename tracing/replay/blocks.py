"""A model's blocks, called one by one with arguments recorded from its own forward.

No architecture is known here: a block gets again what its model gave it, with the rows that are asked for put in
the place of the rows of the recording (hidden states, position ids, rotary embeddings, mask, ALiBi) and a cache
object that puts recorded keys and values before the new ones. An argument that holds a tensor and is none of
these is not understood, and the model is not replayed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.errors import InputError
from locus.hooks import record, record_calls
from locus.model import Model
from tracing.patching.plain_engine import logits_of
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs

Segments = Sequence[tuple[Float[Tensor, "_ head _ d_head"], Float[Tensor, "_ head _ d_head"]]]
"""Recorded keys and values to put before the new ones, in order; a single draw serves all."""

_CACHES = ("past_key_values", "past_key_value", "layer_past")
_HIDDEN = "hidden_states"
_MASKED = ("sdpa", "eager")
"""Attention implementations that take any mask."""


class CannotReplay(Exception):
    """Why this model, or this question, needs whole forwards."""


_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: Exception) -> bool:
    """Whether a device, or the processor's own memory, had no room (for which torch has no error of its own)."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextlib.contextmanager
def failures_refuse_replay() -> Iterator[None]:
    """What a block raises when it is called with arguments of ours is a reason for whole forwards.

    Raises:
        CannotReplay: in place of any error but those of input, of memory, and CannotReplay itself.
    """
    try:
        yield
    except (CannotReplay, InputError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        why = (str(error).splitlines() or [""])[0][:150]
        raise CannotReplay(
            f"a block could not be called by itself ({type(error).__name__}: {why})"
        ) from error


class _Reached(Exception):
    """The keys and values are made; nothing else was wanted of the block."""


def attention_of(model: Model) -> str:
    """The attention implementation that the model runs with, by transformers' name."""
    return str(getattr(model.module.config.get_text_config(), "_attn_implementation", None))


@contextlib.contextmanager
def masked_attention(model: Model) -> Iterator[str]:
    """Attention that takes a mask of ours, within the context; gives its name.

    Flash, flex and other kernels make their masks themselves: there the model computes with SDPA instead, or with
    eager attention where it has no SDPA. A model that cannot be switched keeps what it has, and is refused later.
    """
    module, before = model.module, attention_of(model)
    if before in _MASKED:
        yield before
        return
    chosen = before
    for name in _MASKED:
        with contextlib.suppress(ValueError, ImportError):
            module.set_attn_implementation(name)
            chosen = name
            break
    try:
        yield chosen
    finally:
        if chosen != before:
            module.set_attn_implementation(before)


class PrefixCache:
    """Stands where a block expects its key/value cache: new keys and values are put behind recorded ones."""

    def __init__(self, prefix: Segments, stop: bool = False) -> None:
        self._prefix, self._stop = prefix, stop
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention with its new keys and values, `batch head row d_head`."""
        self.new = (keys, values)
        if self._stop:
            raise _Reached
        if not self._prefix:
            return keys, values
        batch = keys.shape[0]
        before = [(_for_batch(k, batch), _for_batch(v, batch)) for k, v in self._prefix]
        return (
            torch.cat([*(k for k, _ in before), keys], dim=2),
            torch.cat([*(v for _, v in before), values], dim=2),
        )


def _for_batch(tensor: Tensor, batch: int) -> Tensor:
    """One row a draw -> one per batch element; draws run fastest in a batch."""
    draws = tensor.shape[0]
    if draws == batch:
        return tensor
    return tensor.expand(batch, -1, -1, -1) if draws == 1 else tensor.repeat(batch // draws, 1, 1, 1)


@dataclass
class Rows:
    """The rows of one call: `group` sequences of `n` rows for each draw, and which keys each row may see.

    The keys are those of the recorded segments, then the rows' own.
    """

    positions: Int[Tensor, "group n"]
    key_positions: Int[Tensor, "group _"]
    visible: Bool[Tensor, "group n _"]
    """Which keys belong to the same patched run; that a key stands before its query is the model's mask's to say."""
    draws: int
    """Batch elements per group; the batch is `group * draws`, draws fastest."""
    _made: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def once(self, what: str, source: Any, make: Callable[[], Tensor]) -> Tensor:
        """The same for every layer that shares the recorded tensor `source`; it must outlive these rows."""
        key = (what, id(source))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def spread(self, tensor: Tensor) -> Tensor:
        """One row per group -> one per batch element; a single group is left to broadcast."""
        return tensor if tensor.shape[0] == 1 else tensor.repeat_interleave(self.draws, dim=0)


@dataclass(frozen=True)
class Blocks:
    """The blocks of one model, and how it called them on one prompt."""

    model: Model
    modules: tuple[torch.nn.Module, ...]
    arguments: tuple[Mapping[str, Any], ...]
    """Of each block's recorded call, by parameter name."""
    n_pos: int

    def __call__(
        self, layer: int, hidden: Float[Tensor, "batch n d_model"], rows: Rows, prefix: Segments
    ) -> Float[Tensor, "batch n d_model"]:
        """The block's output for these rows."""
        out = self.modules[layer](**self._arguments(layer, hidden, rows, PrefixCache(prefix)))
        return _first(out)

    def with_keys(
        self, layer: int, hidden: Float[Tensor, "batch n d_model"], rows: Rows, prefix: Segments
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The block's output, and the rows' own keys and values."""
        cache = PrefixCache(prefix)
        out = self.modules[layer](**self._arguments(layer, hidden, rows, cache))
        if cache.new is None:
            raise CannotReplay(f"block {layer} makes no keys and values of its own")
        return _first(out), cache.new

    def keys_only(
        self, layer: int, hidden: Float[Tensor, "batch n d_model"], rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """The rows' keys and values; the block stops as soon as it has them."""
        cache = PrefixCache((), stop=True)
        with contextlib.suppress(_Reached):
            self.modules[layer](**self._arguments(layer, hidden, rows, cache))
        if cache.new is None:
            raise CannotReplay(f"block {layer} makes no keys and values of its own")
        return cache.new

    def _arguments(self, layer: int, hidden: Tensor, rows: Rows, cache: PrefixCache) -> dict[str, Any]:
        arguments = dict(self.arguments[layer])
        for name, value in arguments.items():
            if name == _HIDDEN:
                arguments[name] = hidden
            elif name in _CACHES:
                arguments[name] = cache
            elif name == "attention_mask":
                arguments[name] = rows.once("mask", value, partial(_mask, value, rows))
            elif name == "position_ids" and value is not None:
                arguments[name] = rows.once("ids", None, lambda: rows.spread(rows.positions))
            elif name == "position_embeddings" and value is not None:
                arguments[name] = _rotary(value, rows)
            elif name == "alibi" and value is not None:
                arguments[name] = rows.once("alibi", value, partial(_alibi, value, rows))
        return arguments


def _first(output: Any) -> Tensor:
    """What a block returns, or the first of it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _mask(recorded: Tensor | None, rows: Rows) -> Tensor:
    """The recorded mask's entries for these queries and keys, and no key of another run."""
    query, key = rows.positions[:, :, None], rows.key_positions[:, None, :]
    if recorded is None:
        mask = (rows.visible & (key <= query))[:, None]
    else:
        there = recorded.device  # of a model on several devices, the first block's
        entries = recorded[0][:, query.to(there), key.to(there)].transpose(0, 1).to(query.device)
        if recorded.dtype == torch.bool:
            mask = entries & rows.visible[:, None]
        else:
            mask = entries.masked_fill(~rows.visible[:, None], torch.finfo(entries.dtype).min)
    return rows.spread(mask)


def _rotary(recorded: Any, rows: Rows) -> Any:
    if not isinstance(recorded, Tensor):
        return tuple(_rotary(table, rows) for table in recorded)
    there = recorded.device
    return rows.once("rotary", recorded, lambda: rows.spread(recorded[0][rows.positions.to(there)]))


def _alibi(recorded: Tensor, rows: Rows) -> Tensor:
    """`head 1 key` (Bloom, `batch*head 1 key`) or `1 head 1 key` (Falcon), for the keys of these rows."""
    table = recorded if recorded.dim() == 3 else recorded[0]
    out = rows.spread(table[:, 0][:, rows.key_positions.to(table.device)].transpose(0, 1))[:, :, None]
    batch = rows.positions.shape[0] * rows.draws
    out = out.expand(batch, -1, -1, -1)
    return out.flatten(0, 1) if recorded.dim() == 3 else out.contiguous()


@dataclass(frozen=True)
class Recorded:
    """What a whole forward of one prompt left behind."""

    blocks: Blocks
    hidden: tuple[Float[Tensor, "1 pos d_model"], ...]
    """Input of each block, then the output of the last."""
    keys: tuple[Float[Tensor, "1 head pos d_head"], ...]
    values: tuple[Float[Tensor, "1 head pos d_head"], ...]
    outputs: Mapping[str, Tensor]
    """Module name -> recorded output, for the sites that were asked for."""
    inputs: Mapping[str, Tensor]
    logits: Float[Tensor, "1 read d_vocab"]
    """At the positions that are read, by the model's own forward."""


def record_whole(
    model: Model, inputs: Inputs, reads: Sequence[int], outputs: Sequence[str], entries: Sequence[str]
) -> Recorded:
    """Run the model once, and keep all that a replay needs.

    Raises:
        CannotReplay: a block got an argument that is not understood, or keeps no keys and values.
    """
    from transformers import DynamicCache

    module, atlas = model.module, model.atlas
    cache = DynamicCache()
    with (
        record_calls(module, atlas.blocks) as calls,
        record(module, [atlas.blocks[-1], *outputs], [*atlas.blocks, *entries]) as seen,
    ):
        logits = logits_of(model, inputs, reads, 1, past_key_values=cache, use_cache=True)
    n_pos = len(inputs.ids)
    kept: list[list[Any]] = [[getattr(c, name, None) for c in cache.layers] for name in ("keys", "values")]
    keys, values = kept
    if len(keys) != atlas.n_layers or any(k is None or k.shape[2] != n_pos for k in (*keys, *values)):
        raise CannotReplay("its blocks do not each keep keys and values of every position")
    arguments = tuple(_understood(calls[name], model, n_pos) for name in atlas.blocks)
    modules = tuple(module.get_submodule(name) for name in atlas.blocks)
    return Recorded(
        Blocks(model, modules, arguments, n_pos),
        (*(seen.inputs[name] for name in atlas.blocks), seen.outputs[atlas.blocks[-1]]),
        tuple(keys),
        tuple(values),
        seen.outputs,
        seen.inputs,
        logits,
    )


def _understood(call: Mapping[str, Any], model: Model, n_pos: int) -> dict[str, Any]:
    """The arguments of a block's call, if all of them can be given again for other rows."""
    if not isinstance(call.get(_HIDDEN), Tensor) or not any(name in call for name in _CACHES):
        raise CannotReplay("its blocks take no hidden states or no key/value cache")
    attention = attention_of(model)
    for name, value in call.items():
        if name in (_HIDDEN, *_CACHES):
            continue
        if name == "attention_mask":
            if attention not in _MASKED:
                raise CannotReplay(
                    f"attention implementation {attention!r} takes no mask of ours; use sdpa or eager"
                )
            if value is None and attention == "sdpa":
                continue
            square = isinstance(value, Tensor) and value.dim() == 4 and value.shape[-2:] == (n_pos, n_pos)
            if not square or value.shape[0] != 1:
                raise CannotReplay(f"attention mask of a kind that is not understood ({_shape(value)})")
        elif name == "position_embeddings":
            tables = [value] if isinstance(value, Tensor) else list(value or ())
            if any(not isinstance(t, Tensor) or t.shape[:2] != (1, n_pos) for t in tables):
                raise CannotReplay("rotary embeddings of a kind that is not understood")
        elif name == "position_ids":
            if value is not None and value.shape != (1, n_pos):
                raise CannotReplay(f"position ids of a kind that is not understood ({_shape(value)})")
        elif name == "alibi":
            if value is not None and (value.dim() not in (3, 4) or value.shape[-2:] != (1, n_pos)):
                raise CannotReplay(f"ALiBi of a kind that is not understood ({_shape(value)})")
        elif _holds_tensor(value):
            raise CannotReplay(f"its blocks take an argument {name!r} that is not understood")
    return dict(call)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensor(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)


@dataclass(frozen=True)
class Tail:
    """What comes after the last block: final norm, unembedding, soft-capping, scaling."""

    model: Model
    direct: bool
    """Whether norm, unembedding and soft-cap, called one after the other, are all of it (and float32 is enough)."""

    @classmethod
    def of(cls, recorded: Recorded, reads: Sequence[int]) -> Tail:
        """Try both ways on the recorded run, whose logits are known.

        Raises:
            CannotReplay: neither gives the model's own logits.
        """
        hidden, logits = recorded.hidden[-1][:, list(reads)], recorded.logits.float()
        allowed = 1e-3 if logits.dtype == torch.float32 and recorded.logits.dtype == torch.float32 else 0.25
        for direct in (True, False) if recorded.logits.dtype != torch.float64 else (False,):
            tail = cls(recorded.blocks.model, direct)
            if torch.allclose(tail(hidden[0]).float(), logits[0], atol=allowed, rtol=1e-3, equal_nan=True):
                return tail
        raise CannotReplay("what follows its last block is not understood")

    def __call__(self, hidden: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """Logits of last-block outputs."""
        if self.direct:
            from locus.lens import lens_logits

            return lens_logits(self.model, hidden)
        from locus.hooks import patched

        device, atlas = self.model.device, self.model.atlas
        with patched(self.model.module, inputs={atlas.final_norm: lambda _: hidden[None]}):
            logits: Tensor = self.model.module(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False
            ).logits
        return logits.reshape(len(hidden), -1)

    def scores(
        self, hidden: Float[Tensor, "run read d_model"], readout: Readout, max_rows: int
    ) -> Float[Tensor, "run score"]:
        """Read the metric off many runs, a few rows of logits at a time."""
        n_read = hidden.shape[1]
        runs = max(1, max_rows // n_read)
        parts = math.ceil(len(hidden) / runs) if len(hidden) else 0
        scores = [
            readout(self(part.flatten(0, 1)).unflatten(0, (len(part), n_read))).cpu()
            for part in (hidden.tensor_split(parts) if parts else ())
        ]
        return torch.cat(scores) if scores else torch.zeros(0, 2)
