"""The numbers equal TransformerLens' own activation patching on a bridge over a copy of the model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from locus.model import bridge
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.causal import CausalTrace
from tracing.patching.corruption import Corrupter, prepare


@pytest.mark.parametrize("arch", ["llama", "gpt2", "neox"])
def test_patching_on_a_bridge(arch: str) -> None:
    from transformer_lens.patching import generic_activation_patch, layer_pos_patch_setter

    model, fact = tiny_model(arch), tiny_facts()[0]
    one = prepare(fact, encode(model, fact), model.bos, 0)
    settings = CausalTrace(kinds=("block", "mlp", "attn"), samples=3, window=1, noise_sd=1.0)
    traced = settings.run(model, [fact])["tower"]
    noisy = Corrupter.of(model, [one], "gaussian", 3.0, 1.0).inputs(model, one, 3).embeddings
    assert noisy is not None
    twin = bridge(model)
    _, clean = twin.run_with_cache(one.ids[None])

    def corrupt(embedded: Tensor, hook: object) -> Tensor:
        embedded = embedded.clone()
        embedded[:, list(one.positions)] = noisy
        return embedded

    def target_prob(logits: Tensor) -> Tensor:
        return logits[:, -1].softmax(-1)[:, one.encoded.target_ids[0]].mean()

    patch = partial(
        generic_activation_patch,
        twin,
        one.ids.expand(3, -1),
        clean,
        target_prob,
        layer_pos_patch_setter,
        index_axis_names=("layer", "pos"),
    )
    with torch.no_grad(), twin.hooks(fwd_hooks=[("hook_embed", corrupt)]):
        for kind, name in (("block", "resid_post"), ("mlp", "mlp_out"), ("attn", "attn_out")):
            theirs = patch(name)
            ours = traced.scores[kind]
            assert float((ours - theirs).abs().max()) <= 1e-6
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
