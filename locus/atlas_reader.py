"""Drawing the atlas of a model: names from TransformerLens, each proved on the model itself.

The names come from TransformerLens' adapters (adapter.py), which translate its vocabulary into module paths
without touching the model. The proof (atlas_checks.py): shapes, that every block's output is its input +
attention + MLP, that neurons are where they are said to be. What has no exact name is refused.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from locus.atlas import Atlas
from locus.atlas_checks import check_shapes, check_values, evaluating
from locus.atlas_names import Names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_atlas(module: PreTrainedModel) -> Atlas:
    """Name the parts of a causal language model, and prove every name on the model itself.

    The proof takes a few forwards of four tokens; on the meta device, where nothing can be run, only names
    and shapes are checked.

    Args:
        module: A plain transformers model; left as it was, its modes and hooks included.

    Raises:
        InputError: TransformerLens has no adapter for the architecture, or a part of it has no exact name
            (a mixture's experts, recurrent blocks, post-norm or scaled residuals); says which and why.
    """
    names = Names(module)
    layers = range(names.n_layers)
    neurons = tuple(names.neuron_parts(i) for i in layers)
    atlas = Atlas(
        architecture=names.architecture,
        n_layers=names.n_layers,
        d_model=names.d_model,
        d_mlp=names.width(names.block(0, "mlp.out"), "in"),
        n_heads=names.n_heads,
        n_kv_heads=names.n_kv_heads(),
        d_head=names.d_head,
        d_vocab=names.width(names.unembed, "out"),
        parallel=False,  # measured below
        embed=names("embed"),
        final_norm=names("ln_final"),
        unembed=names.unembed,
        blocks=tuple(names.block(i) for i in layers),
        attn=tuple(names.block(i, "attn") for i in layers),
        mlp=tuple(names.mlp(i) for i in layers),
        attn_out=tuple(names.added(i, "hook_attn_out") for i in layers),
        mlp_out=tuple(names.added(i, "hook_mlp_out") for i in layers),
        attn_z=tuple(names.block(i, "attn.o") for i in layers),
        neuron_in=tuple(names.block(i, "mlp.out") for i in layers),
        neurons=neurons,
        **{f"attn_{part}": names.projections(part) for part in ("q", "k", "v")},
    )
    check_shapes(atlas, names)
    with evaluating(module):
        parallel = check_values(atlas, module)
    return dataclasses.replace(atlas, parallel=names.parallel if parallel is None else parallel)
