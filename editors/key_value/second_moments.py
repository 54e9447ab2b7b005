"""Second moments of what the down projections read: C = E[k kᵀ] over text, the metric of every least-squares edit.

The sums are float64 and cached on disk, one file per layer, named after what they were computed from: the weights in
memory that the layer's keys depend on, the configuration, the dtype and the text. A model that was edited in memory
thus has files of its own. A run that is stopped goes on where it was; a finished one is read back. There is no way to
get the identity out of this module: without text there is no metric.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from locus import progress
from locus.embedded import cache_folder
from locus.errors import InputError
from locus.fact import neutral_text
from locus.files.artefact import load_tensors, save_tensors
from locus.fingerprint import configuration, digests, tensor_digest
from locus.forward import Batch, collate
from locus.hooks import record, stop_after
from locus.model import Model
from locus.tokens import Encoded, encode_text
from locus.weight_source import held

KIND = "second-moment"
BLOCK = 512
"""Tokens a block of text holds at most."""
SAVE_SECONDS = 60.0
"""Seconds of work that a kill may cost."""


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """Σ k kᵀ over tokens, k the input of one layer's down projection."""

    total: Float[Tensor, "neuron neuron"]
    """The sum, float64, on the CPU."""
    n_tokens: int
    """Positions summed over, the first of every block included: every prompt has one of them."""

    @property
    def mean(self) -> Float[Tensor, "neuron neuron"]:
        """E[k kᵀ], float64."""
        return self.total / self.n_tokens


def second_moments(
    model: Model,
    layers: Sequence[int],
    text: Sequence[str] = (),
    *,
    n_tokens: int = 100_000,
    batch_tokens: int = 4096,
    folder: Path | None = None,
) -> dict[int, SecondMoment]:
    """Second moments of the inputs of the down projections of some layers, read back where they are known.

    Args:
        model: As it is in memory, edited or not.
        layers: Indices of layers; all that are missing are computed in one pass over the text.
        text: Paragraphs; none for the neutral ones that come with locus (about 5,800 tokens of `smollm2`).
        n_tokens: Stop after so many tokens; a shorter text is read to its end.
        batch_tokens: Padded tokens in one forward; changes nothing beyond rounding.
        folder: Where the sums are kept; None is locus' cache folder.

    Raises:
        InputError: a damaged or foreign file in the cache, or text that cannot be encoded.
    """
    if not layers:
        return {}
    blocks = _blocks(model, text or neutral_text(), n_tokens)
    folder = cache_folder() / "statistics" if folder is None else folder
    made_from = key_sources(model, layers)
    files = {layer: _Kept(folder, model, layer, blocks, made_from[layer]) for layer in layers}
    if missing := [kept for kept in files.values() if kept.n_blocks < len(blocks)]:
        _run(model, missing, blocks, batch_tokens)
    return {layer: SecondMoment(kept.total, kept.n_tokens) for layer, kept in files.items()}


def mean_keys(
    model: Model, layers: Sequence[int], text: Sequence[str], batch_tokens: int = 4096
) -> dict[int, Float[Tensor, " neuron"]]:
    """Mean activation of every neuron of some layers over a text, float64.

    The first token of a block is left out: nothing stands before it, and where it is the same in every text (BOS)
    a few neurons are hundreds of times larger there than anywhere else.
    """
    if not layers:
        return {}
    blocks = _blocks(model, text, 1 << 60)
    total = {layer: torch.zeros(model.atlas.d_mlp, dtype=torch.float64) for layer in layers}
    for start, end in _groups(blocks, 0, batch_tokens, set()):
        keys = _keys(model, collate(blocks, range(start, end)), layers, skip=1)
        for layer, found in zip(layers, keys, strict=True):
            total[layer] += found.sum(0).cpu()
    n_tokens = sum(len(block.ids) - 1 for block in blocks)
    return {layer: summed / n_tokens for layer, summed in total.items()}


def key_sources(model: Model, layers: Sequence[int]) -> dict[int, str]:
    """Digest, by layer, of all that the input of the layer's down projection is computed from, but for the text.

    That is the configuration, the attention implementation, and every parameter and buffer in memory up to the
    layer: not the layer's own down projection, later layers, the final norm or the unembedding. An edit of those
    leaves the digest as it is; any other change of the model gives another one.
    """
    atlas = model.atlas
    tensors = {
        **dict(model.module.named_parameters(remove_duplicate=False)),
        **dict(model.module.named_buffers(remove_duplicate=False)),
    }
    owner = {
        name: layer
        for layer, path in enumerate(atlas.blocks)
        for name in tensors
        if name.startswith(f"{path}.")
    }
    after = tuple(f"{path}." for path in (atlas.final_norm, atlas.unembed) if path != atlas.embed)
    wanted = sorted(set(layers))
    read = [name for name in tensors if owner.get(name, 0) <= wanted[-1] and not name.startswith(after)]

    def digest(name: str) -> str:
        tensor = tensors[name]
        return tensor_digest(held(model, name) if tensor.is_meta else tensor.detach())

    known = digests(read, digest)
    found = {}
    for layer in wanted:
        own = f"{atlas.neuron_in[layer]}."
        below = sorted(
            (name, one)
            for name, one in known.items()
            if owner.get(name, 0) <= layer and not name.startswith(own)
        )
        text = json.dumps([configuration(model.module), below], sort_keys=True, default=str)
        found[layer] = hashlib.sha256(text.encode()).hexdigest()
    return found


class _Kept:
    """One layer's sum so far, and its file."""

    def __init__(
        self, folder: Path, model: Model, layer: int, blocks: Sequence[Encoded], made_from: str
    ) -> None:
        self.layer = layer
        self.about = {
            "made_from": made_from,
            "dtype": str(model.dtype),
            "layer": layer,
            "tokens": sum(len(block.ids) for block in blocks),
            "text": _digest(blocks),
        }
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:24]
        self.path = folder / f"{name}.safetensors"
        self.n_blocks, self.n_tokens = 0, 0
        self.total = torch.zeros(model.atlas.d_mlp, model.atlas.d_mlp, dtype=torch.float64)
        if self.path.exists():
            tensors, meta = load_tensors(self.path, KIND)
            if {key: meta.get(key) for key in self.about} != self.about:
                raise InputError(f"{self.path}: holds the statistics of another model or text; delete it")
            self.total, self.n_blocks, self.n_tokens = tensors["total"], meta["n_blocks"], meta["n_tokens"]

    def save(self) -> None:
        meta = {**self.about, "n_blocks": self.n_blocks, "n_tokens": self.n_tokens}
        save_tensors(self.path, KIND, {"total": self.total}, meta)


def _run(model: Model, missing: Sequence[_Kept], blocks: Sequence[Encoded], batch_tokens: int) -> None:
    """Sum over the blocks that each layer has not seen yet, saving now and then, and when stopped."""
    first = min(kept.n_blocks for kept in missing)
    saved = time.monotonic()
    left = sum(len(block.ids) for block in blocks[first:])
    try:
        with progress.task("second moments", total=left) as line:
            for start, end in _groups(blocks, first, batch_tokens, {kept.n_blocks for kept in missing}):
                due = [kept for kept in missing if kept.n_blocks == start]
                batch = collate(blocks, range(start, end))
                keys = _keys(model, batch, [kept.layer for kept in due])
                for kept, k in zip(due, keys, strict=True):
                    kept.total += (k.mT @ k).cpu()
                    kept.n_tokens, kept.n_blocks = kept.n_tokens + len(k), end
                line.advance(sum(len(block.ids) for block in blocks[start:end]))
                if time.monotonic() - saved > SAVE_SECONDS:
                    for kept in missing:
                        kept.save()
                    saved = time.monotonic()
    finally:
        for kept in missing:
            if kept.n_blocks:
                kept.save()


def _groups(
    blocks: Sequence[Encoded], first: int, batch_tokens: int, stops: set[int]
) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive blocks that fit a forward; none reaches across a stop."""
    groups = [(first, first)]
    width = 0
    for i in range(first, len(blocks)):
        start = groups[-1][0]
        width = max(width, len(blocks[i].ids))
        if i > start and (i in stops or (i + 1 - start) * width > batch_tokens):
            groups.append((i, i))
            width = len(blocks[i].ids)
        groups[-1] = (groups[-1][0], i + 1)
    return groups


@torch.no_grad()
def _keys(
    model: Model, batch: Batch, layers: Sequence[int], skip: int = 0
) -> list[Float[Tensor, "token neuron"]]:
    """What the layers' down projections read at the tokens of a batch, float64; nothing above them runs.

    Args:
        skip: Tokens at the start of every block that are left out.
    """
    names = [model.atlas.neuron_in[layer] for layer in layers]
    batch = batch.to(model.device)
    with (
        record(model.module, inputs=names) as seen,
        stop_after(model.module, model.atlas.neuron_in[max(layers)]),
    ):
        model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
    real = batch.attention_mask.bool()
    real[:, :skip] = False
    return [seen.inputs[name][real.to(seen.inputs[name].device)].double() for name in names]


def _blocks(model: Model, text: Sequence[str], n_tokens: int) -> list[Encoded]:
    """The text's blocks up to `n_tokens`; the last one is cut."""
    if n_tokens < 2:
        raise InputError(f"statistics over {n_tokens} tokens: give at least 2")
    blocks: list[Encoded] = []
    left = n_tokens
    for paragraph in text:
        for block in encode_text(model, paragraph, BLOCK):
            if left < 2:
                return blocks
            if len(block.ids) > left:
                block = Encoded(block.ids[:left], 1, None, block.tokens[:left])
            blocks.append(block)
            left -= len(block.ids)
    return blocks


def _digest(blocks: Sequence[Encoded]) -> str:
    return hashlib.sha256(json.dumps([block.ids for block in blocks]).encode()).hexdigest()
