"""Attribution is the first-order term of exact patching: equal to it where the runs are close."""

from __future__ import annotations

import pytest
import torch

from locus.errors import InputError
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.attribution import estimate
from tracing.corruption import Corrupter, prepare
from tracing.plain import answer_plainly
from tracing.question import Inputs, Question
from tracing.readout import Readout
from tracing.sites import Cell, Patch, cells_of


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "falcon", "olmo2"])
@pytest.mark.parametrize("metric", ["logprob", "prob", "logit_diff"])
def test_tiny_corruptions_are_linear(arch: str, metric: str) -> None:
    """With noise of 1e-3 the estimate's error, of second order, is below 3 % of the largest effect."""
    model = tiny_model(arch)
    model.module.double()
    fact = tiny_facts()[0]
    one = prepare(fact, encode(model, fact), model.bos, 0)
    noisy = Corrupter.of(model, [one], "gaussian", 3.0, 1e-3).inputs(model, one, 2)
    clean = model.module.get_submodule(model.atlas.embed)(one.ids)[list(one.positions)]
    assert noisy.embeddings is not None
    close = noisy.embeddings.double() - noisy.embeddings.double().mean(0) + clean
    question = Question(Inputs(one.ids, one.positions, close), Inputs(one.ids), one.reads)
    readout = Readout(metric, torch.tensor(one.encoded.target_ids), foil=5)  # type: ignore[arg-type]
    kinds = ("block", "mlp", "attn", "head:2")
    cells = [c for kind in kinds for row in cells_of(kind, model.atlas, range(2, 9), 1) for c in row]
    cells.append(Cell((Patch("neuron", (1, 2), (3,), columns=(0, 5)),)))
    for points in (1, 3):
        found, base = estimate(model, question, readout, cells, points=points)
        exact = answer_plainly(model, question, cells, readout)
        torch.testing.assert_close(base, exact.base[:, 0], atol=1e-12, rtol=1e-9)
        effect = exact.cells[..., 0] - exact.base[:, 0]
        off = found - base - effect
        assert float(off.abs().max()) < 3e-2 * float(effect.abs().max())


def test_integrated_gradients_are_nearer_at_the_embedding() -> None:
    """Restoring everything at the input is the whole effect: the mean gradient's error falls with the points."""
    model = tiny_model("llama")
    fact = tiny_facts()[0]
    one = prepare(fact, encode(model, fact), model.bos, 0)
    question = Question(
        Corrupter.of(model, [one], "gaussian", 3.0, 1.0).inputs(model, one, 4), Inputs(one.ids), one.reads
    )
    readout = Readout("logprob", torch.tensor(one.encoded.target_ids))
    whole = [Cell((Patch("block_in", (0, 1), one.positions),))]
    exact = answer_plainly(model, question, whole, readout).cells[0, :, 0]
    errors = [
        (estimate(model, question, readout, whole, points=k)[0][0] - exact).abs().mean() for k in (1, 32)
    ]
    assert float(errors[1]) < 0.05 < float(errors[0])


def test_a_rank_has_no_gradient() -> None:
    model = tiny_model("llama")
    fact = tiny_facts()[0]
    one = prepare(fact, encode(model, fact), model.bos, 0)
    question = Question(Inputs(one.ids), Inputs(one.ids), one.reads)
    with pytest.raises(InputError, match="no gradient"):
        estimate(model, question, Readout("rank", torch.tensor(one.encoded.target_ids)), [])
