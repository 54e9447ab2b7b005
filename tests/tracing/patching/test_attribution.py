"""Attribution is the first-order term of exact patching: equal to it where the runs are close."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from locus.errors import InputError
from locus.hooks import patched, record
from locus.model import Model
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing import CausalTrace
from tracing.patching.attribution import _run, estimate
from tracing.patching.corruption import Corrupter, Prepared, prepare
from tracing.patching.plain_engine import answer_plainly, logits_of
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs, PatchingQuestion
from tracing.patching.sites import Patch, PatchedRun, cells_of


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
    question = PatchingQuestion(Inputs(one.ids, one.positions, close), Inputs(one.ids), one.reads)
    readout = Readout(metric, torch.tensor(one.encoded.target_ids), foil=5)  # type: ignore[arg-type]
    kinds = ["block", "mlp", "attn", "head:2"]
    if model.atlas.attn_q:
        kinds += ["query:2", "key:1", "value:0"]
    cells = [c for kind in kinds for row in cells_of(kind, model.atlas, range(2, 9), 1) for c in row]
    cells.append(PatchedRun((Patch("mlp_post", (1, 2), (3,), columns=(0, 5)),)))
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
    question = PatchingQuestion(
        Corrupter.of(model, [one], "gaussian", 3.0, 1.0).inputs(model, one, 4), Inputs(one.ids), one.reads
    )
    readout = Readout("logprob", torch.tensor(one.encoded.target_ids))
    whole = [PatchedRun((Patch("resid_pre", (0, 1), one.positions),))]
    exact = answer_plainly(model, question, whole, readout).cells[0, :, 0]
    errors = [
        (estimate(model, question, readout, whole, points=k)[0][0] - exact).abs().mean() for k in (1, 32)
    ]
    assert float(errors[1]) < 0.05 < float(errors[0])


def test_a_rank_has_no_gradient() -> None:
    model = tiny_model("llama")
    fact = tiny_facts()[0]
    one = prepare(fact, encode(model, fact), model.bos, 0)
    question = PatchingQuestion(Inputs(one.ids), Inputs(one.ids), one.reads)
    with pytest.raises(InputError, match="no gradient"):
        estimate(model, question, Readout("rank", torch.tensor(one.encoded.target_ids)), [])


def saturated(model: Model) -> tuple[PatchingQuestion, Readout, Prepared]:
    fact = tiny_facts()[0]
    one = prepare(fact, encode(model, fact), model.bos, 0)
    noisy = Corrupter.of(model, [one], "gaussian", 3.0, 2.0).inputs(model, one, 4)
    return (
        PatchingQuestion(noisy, Inputs(one.ids), one.reads),
        Readout("logprob", torch.tensor(one.encoded.target_ids)),
        one,
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt", "qwen3"])
def test_the_attention_fix_is_exact_behind_which_all_is_linear(arch: str) -> None:
    """The definition, one cell at a time: a head's output with that query or key alone, weighed by its gradient."""
    model = tiny_model(arch)
    question, readout, one = saturated(model)
    atlas = model.atlas
    position = one.positions[1]
    sites = [("q", 1), ("k", 1), ("z", 1)]
    other, _, _ = _run(model, question.other, question, readout, sites, gradient=False)  # type: ignore[arg-type]
    base, score, gradients = _run(model, question.base, question, readout, sites, gradient=True)  # type: ignore[arg-type]
    for kind, site, names in (("query:3", "q", atlas.attn_q), ("key:1", "k", atlas.attn_k)):
        cell = cells_of(kind, atlas, [position], 1)[1][0]
        columns = list(cell.patches[0].columns or ())

        def exchange(state: Tensor, site: Any = site, columns: list[int] = columns) -> Tensor:
            state = state.clone()
            state[:, position, columns] = other[site, 1][:, position, columns]
            return state

        with (
            torch.no_grad(),
            patched(model.module, {names[1]: exchange}),
            record(model.module, inputs=[atlas.attn_z[1]]) as seen,
        ):
            logits_of(model, question.base, question.reads, question.samples)
        change = (seen.inputs[atlas.attn_z[1]] - base["z", 1]) * gradients["z", 1]
        found, _ = estimate(model, question, readout, [cell])
        torch.testing.assert_close(found[0], score + change.sum((1, 2)), atol=1e-5, rtol=1e-5)
        unfixed, _ = estimate(model, question, readout, [cell], fix_attention=False)
        assert not torch.allclose(found, unfixed, atol=1e-3)


def test_the_attention_fix_is_nearer_where_attention_is_saturated() -> None:
    """Queries and keys three times as large: the softmax is nearly hard, and its gradient says little."""
    model = tiny_model("llama")
    for name in (*model.atlas.attn_q, *model.atlas.attn_k):
        model.module.get_submodule(name).weight.mul_(3.0)  # type: ignore[operator]
    question, readout, one = saturated(model)
    kinds = [f"{part}:{n}" for part, heads in (("query", 4), ("key", 2)) for n in range(heads)]
    positions = range(one.positions[0], question.n_pos)
    cells = [c for kind in kinds for row in cells_of(kind, model.atlas, positions, 1) for c in row]
    exact = answer_plainly(model, question, cells, readout)
    truth = exact.cells[..., 0] - exact.base[:, 0]
    errors = []
    for fix in (True, False):
        found, base = estimate(model, question, readout, cells, fix_attention=fix)
        errors.append(float((found - base - truth).abs().mean()))
    assert errors[0] < 0.8 * errors[1]


def test_first_prob_does_not_look_at_later_target_tokens() -> None:
    """The same first token, with and without tokens behind it: the same estimates."""
    model = tiny_model("llama")
    grids = []
    for target in (" Paris", " Paris Germany"):
        fact = replace(tiny_facts()[0], target=target, paraphrased_target=None)
        trace = CausalTrace(kinds=("block",), samples=2, metric="first_prob", method="attribution")
        grids.append(trace.run(model, [fact]).facts[0].scores["block"])
    torch.testing.assert_close(grids[0], grids[1], atol=1e-6, rtol=1e-4)


def test_a_divergence_without_gradient_is_refused() -> None:
    model, fact = tiny_model("llama"), tiny_facts()[0]
    settings = {"kinds": ("block",), "samples": 2, "metric": "kl", "direction": "noise"}
    with pytest.raises(InputError, match="gradient zero in the clean run"):
        CausalTrace(method="attribution", **settings).run(model, [fact])  # type: ignore[arg-type]
    exact = CausalTrace(**settings).run(model, [fact]).facts[0]  # type: ignore[arg-type]
    assert float(exact.scores["block"].min()) < -1e-3


@pytest.mark.parametrize("method", ["attribution", "hybrid"])
def test_double_precision(method: str) -> None:
    model = tiny_model("llama")
    model.module.double()
    found = CausalTrace(kinds=("block",), samples=2, method=method).run(model, [tiny_facts()[0]])  # type: ignore[arg-type]
    assert torch.isfinite(found.facts[0].scores["block"]).all()
