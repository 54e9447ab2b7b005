"""The value v* that makes the model say what the edit target wants.

The value delta v* − v, added to one module's output at one position, is found by gradient descent while all weights
stay as they are (Meng et al. 2022, arXiv:2202.05262, section 3.1); the least-squares editors then write it. Facts that
share a key get one value: no weight could tell them apart there, so the losses of all of them are minimized together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from editors.key_value.edit_target import EditTarget
from editors.key_value.key_positions import KeyRow, Place, mean_by_owner, row, states
from editors.key_value.prefix import SuffixForwards
from editors.key_value.value_search import ValueSearch, asked_rows
from locus import progress
from locus.fact import Fact
from locus.model import Model

MOST_KEPT = 2**30
"""Bytes of keys and values that are kept at most, unless one key alone has more."""


@dataclass(frozen=True, eq=False)
class ValueDeltas:
    """The value deltas v* − v found for some keys, and what they do to the facts."""

    delta: Float[Tensor, "key d_model"]
    """What to add to the module's output at the position of the key's facts; float64."""
    start: Float[Tensor, "key d_model"]
    """The output in the plain prompts, mean over the key's facts, before the delta is added; float64."""
    loss: Float[Tensor, " fact"]
    """Loss of the edit target when it was last measured, before the last step, in nats per token."""
    prob: Float[Tensor, " fact"]
    """Probability of the target's first token then, mean over the context prefixes; of a sentence-long target, its
    probability per token."""
    steps: int
    """Steps taken by the slowest key."""
    from_prefix: bool
    """Whether forwards could begin at the prefix's recorded keys and values; else each was run whole: slower."""


def find_value_deltas(
    model: Model,
    groups: Sequence[Sequence[Fact]],
    target: EditTarget,
    site: str,
    prefixes: Sequence[str],
    place: Place = "subject",
    batch_tokens: int = 4096,
) -> ValueDeltas:
    """What to add to the output of the module `site` at the facts' position for the model to answer as wanted.

    The groups are searched for side by side and do not see each other: with an element-wise optimizer that is the
    same as one after the other.

    Args:
        model: As it is in memory; nothing is changed.
        groups: Facts that share a key, one value for each group; a fact alone is a group of one.
        target: What is wanted, and how it is searched for.
        site: Name of a module inside the blocks.
        prefixes: Context prefixes that the losses are averaged over, in addition to the plain prompts.
        place: The last token of the subject or of the prompt.
        batch_tokens: Padded tokens in one forward.

    Returns:
        The deltas in the order of the groups, the facts' figures in the order of the facts.

    Raises:
        InputError: a fact without what the edit target needs (alternatives, a subject), or one that cannot be encoded.
    """
    portions = _portions(model, groups, target, prefixes, place)
    with progress.task("values", total=target.steps * len(portions)) as line:
        found = [
            _found(model, groups[at], target, site, prefixes, place, batch_tokens, line) for at in portions
        ]
    return ValueDeltas(
        torch.cat([one.delta for one in found]),
        torch.cat([one.start for one in found]),
        torch.cat([one.loss for one in found]),
        torch.cat([one.prob for one in found]),
        max(one.steps for one in found),
        all(one.from_prefix for one in found),
    )


def plain_rows(model: Model, groups: Sequence[Sequence[Fact]], place: Place) -> list[KeyRow]:
    """Every fact's prompt as it is; a row's owner is the index of its group."""
    return [row(model, fact, key, place) for key, group in enumerate(groups) for fact in group]


def _portions(
    model: Model,
    groups: Sequence[Sequence[Fact]],
    target: EditTarget,
    prefixes: Sequence[str],
    place: Place,
) -> list[slice]:
    """Groups in order, as many at a time as leave no more than MOST_KEPT bytes of keys and values to be kept."""
    atlas = model.atlas
    per_token = 2 * atlas.n_layers * atlas.n_kv_heads * atlas.d_head * model.dtype.itemsize
    sizes = [0] * len(groups)
    for one in asked_rows(model, groups, target, prefixes, place).rows:
        sizes[one.owner] += one.position * per_token
    found, start, held = [], 0, 0
    for key, size in enumerate(sizes):
        if key > start and held + size > MOST_KEPT:
            found.append(slice(start, key))
            start, held = key, 0
        held += size
    return [*found, slice(start, len(groups))]


def _found(
    model: Model,
    groups: Sequence[Sequence[Fact]],
    target: EditTarget,
    site: str,
    prefixes: Sequence[str],
    place: Place,
    batch_tokens: int,
    line: progress.Task,
) -> ValueDeltas:
    """The value deltas of a portion of the groups."""
    plain = plain_rows(model, groups, place)
    each = states(model, plain, outputs=[site], batch_tokens=batch_tokens)[1][site]
    start = mean_by_owner(each, plain, len(groups))
    asked = asked_rows(model, groups, target, prefixes, place)
    search = ValueSearch(model, site, asked, target, start, batch_tokens)
    for _ in range(target.steps):
        if not search.step():
            break
        line.advance(note=f"loss {float(search.loss.mean()):.2f}")
    return ValueDeltas(
        search.delta.detach().double().cpu(),
        start,
        search.loss,
        search.prob,
        search.steps,
        isinstance(search.forwards, SuffixForwards),
    )
