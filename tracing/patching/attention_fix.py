"""Attribution for queries and keys with the softmax recomputed: the attention fix of AtP* (Kramár et al. 2024).

A query or key reaches the rest of the model through one softmax only. Where attention is saturated its gradient is
next to nothing, however much another query would move it. AtP* (arXiv:2403.00745, section 3.1) therefore recomputes
the attention probabilities with the new query or key, and takes the gradient behind them:

    sum_j (A'_ij - A_ij) * d metric / dA_ij,    where  d metric / dA_ij = g_i . v_j

with g the gradient at the head's output z_i = sum_j A_ij v_j. That sum is (z'_i - z_i) . g_i, so that nothing
needs to know how a model makes its probabilities: its own attention is run with the new query or key, and the
difference of its outputs is weighed. All heads and layers are answered by the same forward, each layer's output put
back behind its attention: one forward for the queries, and one a position for the keys, whose change is seen by all
later positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locus.hooks import patched
from locus.model import Model
from tracing.patching.plain_engine import logits_of
from tracing.patching.runs import PatchingQuestion
from tracing.patching.sites import Site

Values = Mapping[tuple[Site, int], Float[Tensor, "_ pos _"]]
"""(site, layer) -> what it is in a run, or its gradient there."""

FIXED: tuple[Site, ...] = ("q", "k")
"""Sites in front of a softmax."""


def needed_for(sites: Iterable[tuple[Site, int]]) -> set[tuple[Site, int]]:
    """The head outputs whose gradients the fix of some sites takes."""
    return {("z", layer) for site, layer in sites if site in FIXED}


@torch.no_grad()
def fixed_effects(
    model: Model,
    question: PatchingQuestion,
    sites: Sequence[tuple[Site, int]],
    base: Values,
    other: Values,
    gradients: Values,
    positions: Sequence[int],
) -> dict[tuple[Site, int], Float[Tensor, "draw pos _"]]:
    """First-order effect behind the softmax of each head's query (or key) at each position.

    Args:
        model: Left as it is.
        question: The two runs.
        sites: What is patched; those not in `FIXED` are ignored.
        base: The base run's values of these sites and of "z" in the same layers.
        other: The other run's.
        gradients: At "z".
        positions: Whose queries and keys differ; elsewhere the effect is 0.

    Returns:
        (site, layer) -> effect; query heads for "q", key/value heads for "k".
    """
    out: dict[tuple[Site, int], Tensor] = {}
    for site in FIXED:
        layers = [layer for at, layer in sites if at == site]
        if layers:
            found = _effects_at(model, question, site, layers, (base, other, gradients), list(positions))
            out |= {(site, layer): found[layer] for layer in layers}
    return out


def _effects_at(
    model: Model,
    question: PatchingQuestion,
    site: Site,
    layers: Sequence[int],
    values: tuple[Values, Values, Values],
    positions: list[int],
) -> dict[int, Float[Tensor, "draw pos _"]]:
    base, other, gradients = values
    atlas, keys = model.atlas, site == "k"
    n_heads = atlas.n_kv_heads if keys else atlas.n_heads
    found = {layer: torch.zeros(question.samples, question.n_pos, n_heads) for layer in layers}
    alone = _mixes_heads(model, question, site, layers[0], positions, base, other)
    for group in [[q] for q in positions] if keys else [positions]:
        for head in range(n_heads) if alone else (None,):
            changed = _outputs(model, question, site, layers, group, head, base, other)
            for layer in layers:
                change = changed[layer] - _wide(base["z", layer])
                effect = (change * _wide(gradients["z", layer])).unflatten(-1, (atlas.n_heads, -1)).sum(-1)
                effect = (
                    effect.sum(1, keepdim=True) if keys else effect[:, group]
                )  # all later queries see a key
                if head is None:
                    found[layer][:, group] = effect.unflatten(-1, (n_heads, -1)).sum(-1).cpu().float()
                else:
                    found[layer][:, group, head] = effect.sum(-1).cpu().float()
    return found


def _mixes_heads(
    model: Model,
    question: PatchingQuestion,
    site: Site,
    layer: int,
    positions: list[int],
    base: Values,
    other: Values,
) -> bool:
    """Whether the first head's queries (or keys) change other heads' output: a norm over all of them (OLMo-2)."""
    atlas = model.atlas
    changed = _outputs(model, question, site, [layer], positions, 0, base, other)[layer]
    width = changed.shape[-1] // (atlas.n_heads if site == "q" else atlas.n_kv_heads)
    was = _wide(base["z", layer])
    return not torch.allclose(
        changed[..., width:], was[..., width:].expand_as(changed[..., width:]), 1e-3, 1e-5
    )


def _outputs(
    model: Model,
    question: PatchingQuestion,
    site: Site,
    layers: Sequence[int],
    positions: Sequence[int],
    head: int | None,
    base: Values,
    other: Values,
) -> dict[int, Float[Tensor, "draw pos _"]]:
    """What each layer's heads give when their queries or keys at these positions (one head's alone) are exchanged."""
    atlas = model.atlas
    columns = slice(None) if head is None else slice(head * atlas.d_head, (head + 1) * atlas.d_head)
    projections = atlas.attn_q if site == "q" else atlas.attn_k
    got: dict[int, Tensor] = {}

    def exchange(layer: int) -> Callable[[Tensor], Tensor]:
        def patch(state: Tensor) -> Tensor:
            state = state.clone()
            state[:, positions, columns] = other[site, layer][:, positions, columns].to(state)
            return state

        return patch

    def put_back(layer: int) -> Callable[[Tensor], Tensor]:
        def patch(state: Tensor) -> Tensor:
            got[layer] = _wide(state)
            return base["z", layer].to(state).expand_as(state)

        return patch

    outputs = {projections[layer]: exchange(layer) for layer in layers}
    inputs = {atlas.attn_z[layer]: put_back(layer) for layer in layers}
    with patched(model.module, outputs, inputs):
        logits_of(model, question.base, question.reads[:1], question.samples)
    return got


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
