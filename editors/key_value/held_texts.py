"""Texts on which an edit must change nothing, and the second moment of what down projections read there.

A late edit that knows only what to forget also silences the relation's other subjects and the subject's other
relations. What keeps them apart is a metric made of exactly these: neutral text, texts about the subject, the same
about its peers, the facts to keep, and the places that ask, with peers in the subject's stead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from editors.key_value.asking_places import sequence
from editors.key_value.key_positions import KeyRow, grouped
from locus import progress
from locus.elicitation.sampler import prompt_ids
from locus.forward import collate
from locus.hooks import record, stop_after
from locus.lens import lens_logits
from locus.model import Model

ASKING = 3
"""Last positions of an asking place about a peer that are held: those that an edit of the last one comes near to."""
UNSAID = 0.02
"""A position of a subject's text at which its target has more probability than this asks for it, and is not held."""


@dataclass(frozen=True)
class HeldText:
    """A text and which of its positions are held."""

    ids: tuple[int, ...]
    first: int = 1
    """The first position that is held; nothing stands before position 0, where a few neurons are huge."""
    banned: tuple[int, ...] = ()
    """Tokens of the forgotten targets: a position where they are likely is not held."""


@dataclass(frozen=True)
class HeldClass:
    """Texts of one kind."""

    name: str
    texts: Sequence[HeldText]
    weight: float
    """Of this kind's mean against the other kinds'."""


def held_moments(
    model: Model,
    layers: Sequence[int],
    classes: Sequence[HeldClass],
    most: int,
    seed: int,
    batch_tokens: int = 4096,
) -> tuple[dict[int, Float[Tensor, "neuron neuron"]], dict[str, int]]:
    """Σ_c w_c E_c[k kᵀ] / Σ_c w_c over the kinds that have any text, by layer, float64.

    Args:
        model: Before the edit.
        layers: Whose down projections.
        classes: Kinds of texts.
        most: Positions of each kind at most; whole texts are drawn at random.
        seed: Of the draw.
        batch_tokens: Padded tokens in one forward.

    Returns:
        The moments, and how many positions of each kind were held.
    """
    size = model.atlas.d_mlp
    total = {layer: torch.zeros(size, size, dtype=torch.float64) for layer in layers}
    counts: dict[str, int] = {}
    weights = 0.0
    with progress.task("held texts", total=len(classes)) as line:
        for one in classes:
            texts = _drawn(one.texts, most, random.Random(f"{seed} {one.name}"))
            moments, counts[one.name] = _moments(model, layers, texts, batch_tokens)
            if counts[one.name]:
                weights += one.weight
                for layer, moment in moments.items():
                    total[layer] += one.weight / counts[one.name] * moment
            line.advance(note=f"{counts[one.name]} positions of {one.name}")
    return {layer: moment / weights if weights else moment for layer, moment in total.items()}, counts


def about_peers(
    texts: Sequence[str], subject: str, peers: Sequence[str], n: int, choice: random.Random
) -> list[str]:
    """Each text about a subject `n` times, each time with another peer in the subject's place.

    Args:
        texts: Those that do not hold the subject are left out.
        subject: As it stands in the texts.
        peers: To be put there.
        n: At most as many as there are peers.
        choice: Draws the peers.
    """
    return [
        text.replace(subject, peer)
        for text in texts
        if subject in text
        for peer in choice.sample(list(peers), min(n, len(peers)))
    ]


def held_prompts(model: Model, prompts: Sequence[str], whole: bool = False) -> list[HeldText]:
    """Prompts whose last `ASKING` positions are held, or all of them where they are held `whole`."""
    encoded = [tuple(prompt_ids(model, prompt)) for prompt in dict.fromkeys(prompts)]
    return [HeldText(ids, 1 if whole else max(1, len(ids) - ASKING)) for ids in encoded if len(ids) > 1]


def _drawn(texts: Sequence[HeldText], most: int, choice: random.Random) -> list[HeldText]:
    """Texts at random until they have `most` positions."""
    order = list(dict.fromkeys(texts))
    choice.shuffle(order)
    found, total = [], 0
    for text in order:
        if total >= most:
            break
        found.append(text)
        total += len(text.ids) - text.first
    return found


@torch.no_grad()
def _moments(
    model: Model, layers: Sequence[int], texts: Sequence[HeldText], batch_tokens: int
) -> tuple[dict[int, Float[Tensor, "neuron neuron"]], int]:
    """Σ k kᵀ over the held positions, by layer, and their number."""
    names = {layer: model.atlas.neuron_in[layer] for layer in layers}
    size = model.atlas.d_mlp
    total = {layer: torch.zeros(size, size, dtype=torch.float64) for layer in layers}
    n = 0
    rows = [KeyRow(sequence(text.ids), len(text.ids) - 1, 0) for text in texts]
    final = model.atlas.final_norm
    for group in grouped(rows, batch_tokens):
        batch = collate([one.encoded for one in rows], group).to(model.device)
        asks = any(texts[i].banned for i in group)
        inputs = [*names.values(), *([final] if asks else [])]
        with record(model.module, inputs=inputs) as seen, stop_after(model.module, final):
            model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        keep = torch.zeros(batch.ids.shape, dtype=torch.bool)
        for line, i in enumerate(group):
            length = len(texts[i].ids)
            keep[line, texts[i].first : length] = True
            if texts[i].banned:
                keep[line, :length] &= _unsaid(model, seen.inputs[final][line, :length], texts[i].banned)
        n += int(keep.sum())
        for layer, name in names.items():
            keys = seen.inputs[name]
            chosen = keys[keep.to(keys.device)].float()
            total[layer] += (chosen.mT @ chosen).double().cpu()
    return total, n


def _unsaid(
    model: Model, hidden: Float[Tensor, "pos d_model"], banned: Sequence[int]
) -> Bool[Tensor, " pos"]:
    """Positions whose next token is hardly a banned one."""
    probs = lens_logits(model, hidden).softmax(-1)[:, list(banned)].sum(-1)
    return (probs < UNSAID).cpu()
