import pytest
import torch

from locus.errors import InputError
from locus.hooks import patched, record
from tests.tiny import tiny_facts, tiny_model
from tracing.localizers.direct_logit import direct_attribution
from tracing.localizers.fact_lookup import FactLookup, _Pair
from tracing.localizers.indirect_effect import prepare_all
from tracing.patching.corruption import Corrupter
from tracing.patching.plain_engine import logits_of
from tracing.patching.runs import Inputs


def pair_of(arch: str):  # type: ignore[no-untyped-def]
    model = tiny_model(arch)
    prepared = prepare_all(model, tiny_facts(), 0)
    corrupter = Corrupter.of(model, prepared, "gaussian", 3.0)
    corrupted = corrupter.inputs(model, prepared[0], 2)
    return model, prepared[0], corrupted, _Pair.of(model, prepared[0], corrupted)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "neox"])
def test_head_falls_are_falls_of_direct_shares(arch: str) -> None:
    """Clean shares are `direct_attribution`'s; the corrupted run is weighed with the clean run's norms."""
    model, prepared, corrupted, pair = pair_of(arch)
    shares = direct_attribution(model, prepared.encoded).head
    noisy = Inputs(torch.tensor(prepared.encoded.prompt_ids), corrupted.positions, corrupted.embeddings)
    last = len(noisy.ids) - 1
    with torch.no_grad(), record(model.module, inputs=model.atlas.attn_z) as seen:
        logits_of(model, noisy, [last], 2)
    z = torch.stack([seen.inputs[name][:, last].mean(0) for name in model.atlas.attn_z])
    other = (z * pair.directions).view(len(z), model.atlas.n_heads, -1).sum(-1)
    torch.testing.assert_close(pair.head_falls(), shares - other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_a_path_is_patched_as_by_hooks(arch: str) -> None:
    """The slow way: whole forwards, the head's block reading a stream in which one MLP's output is exchanged."""
    model, prepared, corrupted, pair = pair_of(arch)
    atlas, layer, below = model.atlas, 2, 0
    heads = torch.tensor([True, False, True, False])
    ids = torch.tensor(prepared.encoded.prompt_ids)
    noisy = Inputs(ids, corrupted.positions, corrupted.embeddings)
    last = len(ids) - 1
    name, z_name = atlas.mlp_out[below], atlas.attn_z[layer]
    with torch.no_grad(), record(model.module, outputs=[name], inputs=[z_name]) as clean:
        logits_of(model, Inputs(ids), [last], 1)
    with torch.no_grad(), record(model.module, outputs=[name]) as other:
        logits_of(model, noisy, [last], 2)
    falls = []
    for draw in range(2):
        change = other.outputs[name][draw] - clean.outputs[name][0]
        with (
            torch.no_grad(),
            patched(model.module, inputs={atlas.blocks[layer]: lambda x, change=change: x + change}),
            record(model.module, inputs=[z_name]) as seen,
        ):
            logits_of(model, Inputs(ids), [last], 1)
        shares = (clean.inputs[z_name][0, last] - seen.inputs[z_name][0, last]) * pair.directions[layer]
        falls.append((shares.view(atlas.n_heads, -1).sum(1) * heads).sum())
    got = pair.falls_by_mlp(layer, heads)[below]
    torch.testing.assert_close(got, torch.stack(falls).mean(), rtol=1e-3, atol=1e-5)


def test_neurons_fill_the_best_layers_one_after_the_other() -> None:
    model = tiny_model("llama")
    localizer = FactLookup(heads=4)
    layers = localizer.layers(model, tiny_facts()).values
    scores = localizer.run(model, tiny_facts())
    chosen = scores.choose(model.atlas.d_mlp)
    assert chosen[int(layers.argmax())].all() and int(chosen.sum()) == model.atlas.d_mlp
    assert layers[-1] == 0  # no head stands above the last MLP


def test_refuses_more_heads_than_there_are() -> None:
    with pytest.raises(InputError, match="heads is 99"):
        FactLookup(heads=99).run(tiny_model("llama"), tiny_facts())
