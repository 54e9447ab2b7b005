"""The ways in which others patch, written as faithfully as the comparison needs: what trace_speed.py runs against.

Each answers one grid cell, or a batch of them, and returns the mean probability of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locus.hooks import patched
from locus.model import Model, bridge


@dataclass(frozen=True)
class Traced:
    """One prompt to trace: what every baseline needs."""

    ids: Tensor
    """[pos]"""
    subject: tuple[int, ...]
    noisy: Tensor
    """[sample, n, d_model], the corrupted embeddings at the subject's positions."""
    target: int


Cell = tuple[int, int]
"""(layer, position) whose block output is restored."""


@torch.no_grad()
def rome_cell(model: Model, one: Traced, cell: Cell) -> float:
    """Causal tracing as published (Meng et al. 2022): one forward of 1 + S rows, row 0 clean, all logits."""
    layer, position = cell
    ids = one.ids.expand(1 + len(one.noisy), -1)

    def corrupt(embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        embedded[1:, list(one.subject)] = one.noisy.to(embedded)
        return embedded

    def restore(hidden: Tensor) -> Tensor:
        hidden[1:, position] = hidden[0, position]
        return hidden

    with patched(model.module, {model.atlas.embed: corrupt, model.atlas.blocks[layer]: restore}):
        logits = model.module(input_ids=ids, use_cache=False).logits
    return float(logits[1:, -1].float().softmax(-1).mean(dim=0)[one.target])


def transformer_lens_cells(model: Model, one: Traced) -> Callable[[Sequence[Cell]], list[float]]:
    """TransformerLens' `generic_activation_patch` on a TransformerBridge over a copy of the model."""
    import pandas as pd
    from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

    twin = bridge(model)
    with torch.no_grad():
        _, clean = twin.run_with_cache(one.ids[None], names_filter=lambda name: name.endswith("resid_post"))

    def corrupt(embedded: Tensor, hook: Any) -> Tensor:
        embedded = embedded.clone()
        embedded[:, list(one.subject)] = one.noisy.to(embedded)
        return embedded

    def probability(logits: Tensor) -> Tensor:
        return logits[:, -1].float().softmax(-1)[:, one.target].mean()

    @torch.no_grad()
    def answer(cells: Sequence[Cell]) -> list[float]:
        index = pd.DataFrame(list(cells), columns=["layer", "pos"])
        with twin.hooks(fwd_hooks=[("hook_embed", corrupt)]):
            got = generic_activation_patch(
                twin,
                one.ids.expand(len(one.noisy), -1),
                clean,
                probability,
                layer_pos_patch_setter,
                "resid_post",
                index_df=index,
            )
        return list(got.tolist())

    return answer


def naive_cells(model: Model, one: Traced, last_logits_only: bool) -> Callable[[Sequence[Cell]], list[float]]:
    """Several cells in one batch of whole forwards of S rows each; the clean states are recorded once.

    Args:
        last_logits_only: Unembed the last position alone (which a careful author does) or all of them.
    """
    from locus.hooks import record

    with torch.no_grad(), record(model.module, outputs=model.atlas.blocks) as clean:
        model.module(input_ids=one.ids[None], use_cache=False)
    states = [clean.outputs[name][0] for name in model.atlas.blocks]
    samples = len(one.noisy)

    @torch.no_grad()
    def answer(cells: Sequence[Cell]) -> list[float]:
        def corrupt(embedded: Tensor) -> Tensor:
            embedded = embedded.clone()
            embedded[:, list(one.subject)] = one.noisy.to(embedded).repeat(len(cells), 1, 1)
            return embedded

        def restorer(layer: int) -> Callable[[Tensor], Tensor]:
            def restore(hidden: Tensor) -> Tensor:
                for i, (at, position) in enumerate(cells):
                    if at == layer:
                        hidden[i * samples : (i + 1) * samples, position] = states[layer][position]
                return hidden

            return restore

        hooks = {model.atlas.blocks[layer]: restorer(layer) for layer in {layer for layer, _ in cells}}
        inputs = {model.atlas.unembed: lambda h: h[:, -1:].contiguous()} if last_logits_only else {}
        ids = one.ids.expand(samples * len(cells), -1)
        with patched(model.module, {model.atlas.embed: corrupt, **hooks}, inputs):
            logits = model.module(input_ids=ids, use_cache=False).logits
        probs = logits[:, -1].float().softmax(-1)[:, one.target]
        return list(probs.view(len(cells), samples).mean(dim=1).tolist())

    return answer
