"""Where an edit looks: the last token of the subject, in the prompt itself and after random context prefixes.

What a layer reads at the subject's last token is the fact's key (Meng et al. 2022, arXiv:2202.05262). It depends
on what stands before the subject, so it is averaged over prompts with other text in front; ROME lets the model
write that text, here it is sentences drawn from the neutral text, which need no generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact, trainable_facts
from locus.forward import Batch, collate
from locus.hooks import record, stop_after
from locus.model import Model
from locus.readers.scripts import ends_sentence, sentences, units
from locus.tokens import Encoded, encode

Place = Literal["subject", "prompt"]
"""The last token of the subject, or of the prompt."""
SHORT, LONG = 3, 12
"""Words a sentence must at least and may at most have to be a context prefix."""


@dataclass(frozen=True, eq=False)
class KeyRow:
    """One sequence, and the position in it that an edit concerns."""

    encoded: Encoded
    position: int
    """Index of the token whose key and value are meant."""
    owner: int
    """Index of the fact it belongs to, or of the key where facts share one."""


def context_prefixes(text: Sequence[str], n: int, seed: int = 0) -> list[str]:
    """`n` different short sentences of a text, drawn at random.

    Raises:
        InputError: the text has fewer.
    """
    found = {s for paragraph in text for s in sentences(paragraph) if ends_sentence(s)}
    fit = sorted(s for s in found if SHORT <= sum(1 for _ in units(s)) <= LONG)
    if len(fit) < n:
        raise InputError(
            f"{n} context prefixes wanted, but the text has {len(fit)} sentences of {SHORT} to {LONG} words: "
            "give more text, or fewer prefixes"
        )
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))
    return [fit[int(i)] for i in order[:n]]


def rows(
    model: Model,
    facts: Sequence[Fact],
    prefixes: Sequence[str] = (),
    place: Place = "subject",
) -> list[KeyRow]:
    """The facts' prompts with their targets: each as it is, then after every context prefix.

    Raises:
        InputError: a fact without a subject where its place is wanted, or one that cannot be encoded.
    """
    found = []
    for number, fact in enumerate(facts):
        for prefix in ("", *prefixes):
            found.append(row(model, with_prefix(fact, prefix), number, place))
    return found


def row(model: Model, fact: Fact, number: int, place: Place = "subject") -> KeyRow:
    """One fact's sequence, with the position that is meant.

    Raises:
        InputError: see `rows`.
    """
    encoded = encode(model, fact)
    if place == "prompt":
        return KeyRow(encoded, encoded.target_start - 1, number)
    if encoded.subject is None:
        raise InputError(
            f"{fact.source or f'fact {fact.id!r}'}: has no subject, but the edit is made at its last token: "
            "name the subject, edit at the prompt's last token (--place prompt), or train located weights (--mask)"
        )
    return KeyRow(encoded, encoded.subject[1] - 1, number)


def with_prefix(fact: Fact, prefix: str) -> Fact:
    """The same fact with a context prefix before its prompt."""
    if not prefix:
        return fact
    span = fact.subject_span
    start = None if span is None else span[0] + len(prefix) + 1
    return replace(fact, prompt=f"{prefix} {fact.prompt}", subject_start=start)


@torch.no_grad()
def states(
    model: Model,
    rows: Sequence[KeyRow],
    *,
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
    batch_tokens: int = 4096,
) -> tuple[dict[str, Float[Tensor, "row _"]], dict[str, Float[Tensor, "row _"]]]:
    """What goes into and comes out of named modules at each row's position, float64 on the CPU.

    Args:
        rows: Sequences and positions.
        inputs: Names of modules whose input is wanted.
        outputs: Names of modules whose output is wanted.
        batch_tokens: Padded tokens in one forward.

    Returns:
        Inputs by module name, and outputs by module name.
    """
    inputs, outputs = list(inputs), list(outputs)
    last = _last(model, [*inputs, *outputs])
    pieces: tuple[Mapping[str, list[Tensor]], Mapping[str, list[Tensor]]] = (
        {name: [] for name in inputs},
        {name: [] for name in outputs},
    )
    groups = grouped(rows, batch_tokens)
    for group in groups:
        batch = batch_of(rows, group).to(model.device)
        with record(model.module, outputs=outputs, inputs=inputs) as seen, stop_after(model.module, last):
            model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        where = torch.tensor([rows[i].position for i in group])
        for into, got in zip(pieces, (seen.inputs, seen.outputs), strict=True):
            for name, found in into.items():
                at = where.to(got[name].device)
                found.append(got[name][torch.arange(len(group), device=at.device), at].double().cpu())
    order = torch.tensor([i for group in groups for i in group]).argsort()
    first, second = ({name: torch.cat(found)[order] for name, found in into.items()} for into in pieces)
    return first, second


def retain_moments(
    model: Model,
    retain: Sequence[Fact],
    layers: Sequence[int],
    prefixes: Sequence[str],
    place: Place,
    weight: float,
    batch_tokens: int = 4096,
) -> dict[int, Float[Tensor, "neuron neuron"]]:
    """`weight` · E[k kᵀ] over the keys of the retain facts that are not held out, by layer; 0 without any.

    Added to the text's second moment it makes an update keep away from facts like the edited ones, whose keys
    are rare in text. A fact without a subject counts with the last token of its prompt.

    Raises:
        InputError: the weight is negative, or a fact cannot be encoded.
    """
    if weight < 0:
        raise InputError(f"retain_weight = {weight}: must not be negative")
    size = model.atlas.d_mlp
    total = {layer: torch.zeros(size, size, dtype=torch.float64) for layer in layers}
    kept = trainable_facts(retain)
    if not kept or not weight:
        return total
    seen = [
        row(model, with_prefix(fact, prefix), number, place if fact.subject is not None else "prompt")
        for number, fact in enumerate(kept)
        for prefix in ("", *prefixes)
    ]
    names = {layer: model.atlas.neuron_in[layer] for layer in layers}
    keys, _ = states(model, seen, inputs=names.values(), batch_tokens=batch_tokens)
    return {layer: weight * keys[name].mT @ keys[name] / len(seen) for layer, name in names.items()}


def mean_by_owner(
    values: Float[Tensor, "row d"], rows: Sequence[KeyRow], n_owners: int
) -> Float[Tensor, "owner d"]:
    """The mean over each owner's rows."""
    owner = torch.tensor([one.owner for one in rows])
    total = values.new_zeros(n_owners, values.shape[1]).index_add(0, owner, values)
    return total / torch.bincount(owner, minlength=n_owners)[:, None]


def grouped(rows: Sequence[KeyRow], batch_tokens: int) -> list[list[int]]:
    """Indices of rows in groups of like length that fit a forward."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].encoded.ids), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[i].encoded.ids) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def batch_of(rows: Sequence[KeyRow], group: Sequence[int]) -> Batch:
    """The rows of a group as one batch; `Batch.examples` are their indices."""
    return collate([one.encoded for one in rows], group)


def _last(model: Model, names: Sequence[str]) -> str:
    """The highest block that is, or holds, one of the named modules, or the final norm where that is one of them:
    when it has run, all of them have."""
    blocks = model.atlas.blocks
    if model.atlas.final_norm in names:
        return model.atlas.final_norm
    return next(path for path in reversed(blocks) if any(f"{name}.".startswith(f"{path}.") for name in names))
