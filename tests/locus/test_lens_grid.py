"""The lens as a table, against the model's own answer and against sums written out by hand."""

from __future__ import annotations

import pytest
import torch

from locus.errors import InputError
from locus.hooks import patched, record
from locus.lens import _cells, lens_grid, lens_logits, load_grids, save_grids
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "cohere"])
def test_the_last_layer_is_the_models_own_answer(arch):
    model = tiny_model(arch)
    encoded = encode(model, tiny_facts()[0])
    grid = lens_grid(model, encoded, "tower")
    logits = model.module(torch.tensor([encoded.prompt_ids])).logits[0].float()
    probs = logits.softmax(-1)
    label = encoded.target_ids[0]
    assert torch.allclose(grid.prob[-1], probs[:, label], atol=1e-5)
    assert torch.equal(grid.rank[-1], (logits > logits[:, label, None]).sum(-1))
    assert torch.allclose(grid.kl[-1], torch.zeros_like(grid.kl[-1]), atol=1e-5)
    assert torch.equal(grid.top_ids[-1, :, 0], logits.argmax(-1))
    assert grid.prob.shape == (model.atlas.n_layers, len(encoded.prompt_ids))


def test_entropy_and_kl_are_what_their_names_say():
    model = tiny_model("llama")
    encoded = encode(model, tiny_facts()[0])
    grid = lens_grid(model, encoded, "tower", "resid_post")
    first = model.atlas.blocks[0]
    with record(model.module, outputs=[first]) as seen:
        final = model.module(torch.tensor([encoded.prompt_ids])).logits[0].softmax(-1)
    lens = lens_logits(model, seen.outputs[first][0]).softmax(-1)
    position = 2
    entropy = -sum(float(p) * float(p.log()) for p in lens[position] if p > 0)
    divergence = sum(
        float(f) * float((f / p).log()) for f, p in zip(final[position], lens[position], strict=True) if f > 0
    )
    assert float(grid.entropy[0, position]) == pytest.approx(entropy, rel=1e-4)
    assert float(grid.kl[0, position]) == pytest.approx(divergence, rel=1e-3)


def test_the_residual_before_the_mlp_plus_the_mlp_is_the_block():
    model = tiny_model("llama")
    encoded = encode(model, tiny_facts()[0])
    module = model.module.get_submodule(model.atlas.mlp_out[1])
    weight = module.down_proj.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.zero_()
        mid = lens_grid(model, encoded, "tower", "resid_mid")
        out = lens_grid(model, encoded, "tower", "resid_post")
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert torch.allclose(mid.prob[1], out.prob[1], atol=1e-6)
    assert not torch.allclose(mid.prob[0], out.prob[0], atol=1e-6)


def test_parallel_blocks_have_no_middle():
    model = tiny_model("gptj")
    with pytest.raises(InputError, match="side by side"):
        lens_grid(model, encode(model, tiny_facts()[0]), "tower", "resid_mid")


def test_rows_at_once_do_not_matter_and_grids_survive_saving(tmp_path):
    model = tiny_model("gemma2")
    encoded = encode(model, tiny_facts()[0])
    whole = lens_grid(model, encoded, "tower", "mlp_out")
    pieces = lens_grid(model, encoded, "tower", "mlp_out", max_rows=2)
    assert torch.allclose(whole.prob, pieces.prob, atol=1e-6)
    save_grids([whole], tmp_path / "lens.safetensors", {"model": "tiny"})
    (back,) = load_grids(tmp_path / "lens.safetensors")
    assert torch.equal(back.top_ids, whole.top_ids)
    assert (back.tokens, back.top_tokens, back.target) == (whole.tokens, whole.top_tokens, whole.target)
    assert back.readable_from == whole.readable_from


def test_what_is_no_number_is_named():
    model = tiny_model("llama")
    with (
        patched(model.module, {model.atlas.blocks[1]: lambda state: state * torch.inf}),
        pytest.raises(InputError, match="fact 'tower': layer 1 of tiny-llama gives NaN or infinity"),
    ):
        lens_grid(model, encode(model, tiny_facts()[0]), "tower")


def test_no_cell_keeps_the_whole_distribution_alive():
    """What is kept of 128 rows is a few numbers each, in storage of its own."""
    logits, final = torch.randn(2, 3, 50), torch.randn(3, 50).log_softmax(-1)
    for tensor in _cells(logits, final, 7, 5):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
