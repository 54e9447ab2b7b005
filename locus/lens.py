"""The logit lens: what the model would say if it stopped at a layer (nostalgebraist 2020).

The residual stream after each block goes through the final norm and the unembedding as if it were the
last one. At the last layer that is the model's own answer, exactly. Patil et al. 2024 (arXiv:2309.17410) use
it as an attack: an edited model may still hold the answer at an inner layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.atlas import OLD_SITES
from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood, value_of
from locus.finite_checks import is_finite
from locus.forward import batches, label_logits
from locus.hooks import record, stop_after
from locus.model import Model
from locus.nonfinite import blame
from locus.parallel.sharding import device_of, unshard
from locus.tokens import Encoded


@dataclass(frozen=True)
class LensScores:
    """The first target token seen through the lens at the last prompt position, after each block."""

    rank: Int[Tensor, "example layer"]
    """Tokens with a higher logit than the target; 0 where the layer would answer right."""
    bottom_rank: Int[Tensor, "example layer"]
    """Tokens with a lower logit than the target; 0 where it is the least likely of all."""
    prob: Float[Tensor, "example layer"]
    """Probability of the target."""


def lens_logits(model: Model, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Unembed residual-stream states as the model does its last ones: final norm, unembedding, scale, soft-cap.

    Returns:
        Logits in float32.
    """
    unshard(model.module)
    modules = dict(model.module.named_modules())
    norm, head = modules[model.atlas.final_norm], modules[model.atlas.unembed]
    weight = next(norm.parameters(), hidden)
    if not weight.is_meta:  # what is offloaded brings its own device
        hidden = hidden.to(device_of(weight))
    logits: Tensor = head(norm(hidden)).float()
    scale = getattr(model.module, "logit_scale", None)  # Cohere's models multiply their logits
    logits = logits * scale if isinstance(scale, int | float) else logits
    softcap = getattr(model.module.config.get_text_config(), "final_logit_softcapping", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def lens_scores(model: Model, encoded: Sequence[Encoded], max_tokens: int = 4096) -> LensScores:
    """Rank and probability of each first target token after every block, at the last prompt position.

    Args:
        model: Left as it is.
        encoded: The examples.
        max_tokens: Batch size in tokens.
    """
    shape = (len(encoded), model.atlas.n_layers)
    rank, bottom = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    prob = torch.zeros(shape)
    for batch in batches([_first_target(one) for one in encoded], max_tokens):
        with torch.no_grad(), record(model.module, outputs=model.atlas.blocks) as seen:
            label_logits(model, batch)
        for layer, block in enumerate(model.atlas.blocks):
            with torch.no_grad():
                state = seen.outputs[block]
                logits = lens_logits(model, state[batch.rows.to(state.device), batch.cols.to(state.device)])
            labels = batch.labels.to(logits.device)[:, None]
            own = logits.gather(-1, labels)
            example = batch.example.cpu()
            rank[example, layer] = (logits > own).sum(-1).cpu()
            bottom[example, layer] = (logits < own).sum(-1).cpu()
            prob[example, layer] = logits.softmax(-1).gather(-1, labels)[:, 0].cpu()
    return LensScores(rank, bottom, prob)


def _first_target(encoded: Encoded) -> Encoded:
    """The same prompt with only the first token of its target."""
    end = encoded.target_start + 1
    return Encoded(encoded.ids[:end], encoded.target_start, encoded.subject, encoded.tokens[:end])


LensSite = Literal["resid_post", "resid_mid", "attn_out", "mlp_out"]
LENS_SITES: tuple[LensSite, ...] = ("resid_post", "resid_mid", "attn_out", "mlp_out")


@dataclass(frozen=True)
class LensGrid:
    """One prompt through the lens, after every layer and at every position."""

    fact_id: str
    site: LensSite
    """What was read: the residual stream after a block, before its MLP, or what attention or MLP alone write."""
    tokens: tuple[str, ...]
    """The prompt's tokens, as text."""
    target: str
    """The target's first token, as text."""
    rank: Int[Tensor, "layer pos"]
    """Tokens with a higher logit than the target; 0 where it is on top."""
    prob: Float[Tensor, "layer pos"]
    """Probability of the target's first token."""
    entropy: Float[Tensor, "layer pos"]
    """Of the lens distribution, in nats."""
    kl: Float[Tensor, "layer pos"]
    """KL(final distribution || lens distribution), in nats."""
    top_probs: Float[Tensor, "layer pos k"]
    """Probabilities of the k likeliest tokens, falling."""
    top_ids: Int[Tensor, "layer pos k"]
    """Those tokens."""
    top_tokens: tuple[tuple[str, ...], ...]
    """Layer -> position -> the likeliest token, as text."""

    @property
    def readable_from(self) -> int | None:
        """First layer from which on the target stays on top at the last position; None if it never does."""
        wrong = (self.rank[:, -1] > 0).nonzero().flatten()
        first = int(wrong[-1]) + 1 if len(wrong) else 0
        return first if first < len(self.rank) else None


@torch.no_grad()
def lens_grid(
    model: Model,
    encoded: Encoded,
    fact_id: str,
    site: LensSite = "resid_post",
    k: int = 5,
    max_rows: int = 128,
    translate: Callable[[Tensor, int], Tensor] | None = None,
) -> LensGrid:
    """Read every layer and prompt position of one example through the model's own unembedding.

    Args:
        model: Left as it is.
        encoded: The example; only its prompt is run.
        fact_id: Names the grid.
        site: What is read.
        k: Likeliest tokens kept in each cell.
        max_rows: States unembedded at once.
        translate: Applied to the states of a layer before they are read: a tuned lens' translator.

    Raises:
        InputError: "resid_mid" on a model whose attention and MLP read the same input (there is no such place), or
            NaN or infinity, named by layer and example.
    """
    atlas, n = model.atlas, encoded.target_start
    if site == "resid_mid" and atlas.parallel:
        raise InputError(
            f"{model.name}: attention and MLP run side by side, there is no residual before the MLP"
        )
    outputs = {"resid_post": atlas.blocks, "attn_out": atlas.attn_out, "mlp_out": atlas.mlp_out}.get(
        site, atlas.attn_out
    )
    inputs = atlas.blocks if site == "resid_mid" else ()
    recorded = record(model.module, outputs=[*outputs, atlas.blocks[-1]], inputs=inputs)
    with recorded as seen, stop_after(model.module, atlas.blocks[-1]):  # nobody reads the logits
        ids = torch.tensor([encoded.ids[:n]], device=model.device)
        model.module(input_ids=ids, use_cache=False)
    states = [seen.outputs[name][0] for name in outputs]
    if site == "resid_mid":
        states = [state + seen.inputs[name][0] for state, name in zip(states, atlas.blocks, strict=True)]
    if translate is not None:
        states = [translate(state, layer) for layer, state in enumerate(states)]
    last = seen.outputs[atlas.blocks[-1]][0]
    label = encoded.ids[n]
    rank, prob, entropy, kl, top_probs, top_ids = _read_cells(model, states, last, label, k, max_rows)
    if not is_finite(prob, top_probs):
        raise blame(model, [(fact_id, encoded)], "what the lens reads")
    words = tuple(tuple(str(model.tokenizer.decode([int(best)])) for best in row) for row in top_ids[:, :, 0])
    target = str(model.tokenizer.decode([label]))
    return LensGrid(
        fact_id, site, encoded.tokens[:n], target, rank, prob, entropy, kl, top_probs, top_ids, words
    )


def _read_cells(
    model: Model, states: Sequence[Tensor], last: Tensor, label: int, k: int, max_rows: int
) -> tuple[Tensor, ...]:
    """Rank, probability, entropy, KL, top probabilities and top ids, each `[layer, pos, ...]`.

    As many layers as `max_rows` takes are unembedded in one product; the last one's distribution is made once.
    """
    pieces = []
    for start in range(0, len(last), max_rows):
        there = slice(start, start + max_rows)
        final = lens_logits(model, last[there]).log_softmax(-1)
        at_once = max(1, max_rows // len(final))
        groups = [states[i : i + at_once] for i in range(0, len(states), at_once)]
        cells = [
            _cells(
                lens_logits(model, torch.stack([state[there].to(last.device) for state in group])),
                final,
                label,
                k,
            )
            for group in groups
        ]
        pieces.append([torch.cat(parts) for parts in zip(*cells, strict=True)])
    return tuple(torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))


def _cells(
    logits: Float[Tensor, "layer pos d_vocab"], final: Float[Tensor, "pos d_vocab"], label: int, k: int
) -> tuple[Tensor, ...]:
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    top = probs.topk(k, dim=-1)
    found = (
        (logits > logits[..., label, None]).sum(-1),
        probs[..., label].clone(),  # a view would keep all of `probs` alive
        -(probs * log_probs).sum(-1),
        (final.exp() * (final - log_probs)).sum(-1),
        top.values,
        top.indices,
    )
    return tuple(tensor.cpu() for tensor in found)


def save_grids(grids: Sequence[LensGrid], path: str | Path, meta: Mapping[str, Any]) -> None:
    """Write kind "lens": for each fact and site the tensors of its grid; words and settings in the header."""
    tensors = {
        f"{grid.fact_id}/{grid.site}/{name}": getattr(grid, name).contiguous()
        for grid in grids
        for name in _TENSORS
    }
    about = [
        {
            "fact_id": grid.fact_id,
            "site": grid.site,
            "tokens": list(grid.tokens),
            "target": grid.target,
            "top_tokens": [list(row) for row in grid.top_tokens],
        }
        for grid in grids
    ]
    save_tensors(Path(path), "lens", tensors, {**meta, "grids": about})


def load_grids(path: str | Path) -> list[LensGrid]:
    """Read what `save_grids` wrote. Raises InputError for anything else."""
    tensors, meta = load_tensors(Path(path), "lens")
    with understood(path, "lens", "run locus lens again"):
        if old := sorted({one["site"] for one in meta["grids"]} & OLD_SITES.keys()):
            now = ", ".join(f"{name} is now called {OLD_SITES[name]}" for name in old)
            warnings.warn(f"{path}: {now}; the old name goes with the next release", stacklevel=2)
        return [
            LensGrid(
                fact_id=one["fact_id"],
                site=value_of(LensSite, OLD_SITES.get(one["site"], one["site"]), "site"),
                tokens=tuple(one["tokens"]),
                target=one["target"],
                top_tokens=tuple(tuple(row) for row in one["top_tokens"]),
                **{name: tensors[f"{one['fact_id']}/{one['site']}/{name}"] for name in _TENSORS},
            )
            for one in meta["grids"]
        ]


_TENSORS = ("rank", "prob", "entropy", "kl", "top_probs", "top_ids")
