import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from locus.errors import InputError
from locus.model import Model
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.gradients.neuron_gradients import label_logprobs
from tracing.localizers.weight_saliency import WAGLE_MU, Score, WeightSaliency, WeightScores

RETAIN = [fact.neighbours[0] for fact in tiny_facts()]
NAME = "model.layers.1.mlp.up_proj.weight"


def gradients(model: Model, examples: list) -> list[Tensor]:  # type: ignore[type-arg]
    """Slow and obvious: one backward an example, of log p(target), for one parameter."""
    parameter = model.module.get_parameter(NAME).requires_grad_(True)
    found = []
    for example in examples:
        one = encode(model, example)
        logprobs = model.module(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        total = sum(logprobs[t - 1, one.ids[t]] for t in range(one.target_start, len(one.ids)))
        found.append(torch.autograd.grad(total, parameter)[0])
    parameter.requires_grad_(False)
    return found


@pytest.mark.parametrize("score", ["gradient", "weight-gradient", "fisher", "difference", "ratio", "wagle"])
def test_scores_are_the_formulas(score: Score) -> None:
    model = tiny_model("llama")
    weight = model.module.get_parameter(NAME).detach()
    forget = torch.stack(gradients(model, tiny_facts()))
    g, g_r = forget.mean(0), torch.stack(gradients(model, RETAIN)).mean(0)
    expected = {
        "gradient": g.abs(),
        "weight-gradient": (g * weight).abs(),
        "fisher": (forget**2).mean(0),
        "difference": g.abs() - g_r.abs(),
        "ratio": g.abs() / (g_r.abs() + 1e-3 * g_r.abs().mean()),
        "wagle": WAGLE_MU * ((weight - g_r / WAGLE_MU) * g).abs(),
    }[score]
    got = WeightSaliency(score=score).run(model, tiny_facts(), RETAIN).values[NAME]
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6 * float(expected.abs().max()))


def test_groups_and_batches_change_nothing_and_nothing_is_left_behind() -> None:
    model = tiny_model("smollm")
    whole = WeightSaliency().run(model, tiny_facts())
    parts = WeightSaliency(groups=5).run(model, tiny_facts(), batch_tokens=1)
    assert set(whole.values) == set(parts.values) == set(dict(model.module.named_parameters()))
    for name, values in whole.values.items():
        torch.testing.assert_close(values, parts.values[name], rtol=1e-3, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


def test_the_top_is_the_k_largest_of_all_parameters() -> None:
    model = tiny_model("gpt2")
    scores = WeightSaliency(parameters=("*.mlp.*",)).run(model, tiny_facts())
    mask = scores.top(100)
    assert mask.n_weights == 100
    every = torch.cat([values.flatten() for values in scores.values.values()])
    least = every.sort(descending=True).values[99]
    for name, selection in mask.entries.items():
        assert bool((selection.take(scores.values[name]) >= least).all())
    assert all(".mlp." in name for name in mask.entries)
    by_parameter = scores.top("10%", per_layer=True)
    assert set(by_parameter.entries) == set(scores.values)


def test_parts_keep_other_neuron_tensors_out() -> None:
    scores = WeightSaliency(parameters=("*.mlp.*",)).run(tiny_model("llama"), tiny_facts())
    assert all("down_proj" in name for name in scores.top("5%", parts=("down",)).entries)


def test_saved_scores_come_back(tmp_path: Path) -> None:
    scores = WeightSaliency(parameters=(NAME,)).run(tiny_model("llama"), tiny_facts())
    scores.save(tmp_path / "scores.safetensors")
    back = WeightScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(back.values[NAME], scores.values[NAME])
    assert back.fingerprint == scores.fingerprint and back.atlas == scores.atlas


def test_refuses_what_it_cannot_do() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="retain set"):
        WeightSaliency(score="wagle").run(model, tiny_facts())
    with pytest.raises(InputError, match="none of this name"):
        WeightSaliency(parameters=("*.experts.*",)).run(model, tiny_facts())


def test_cost_counts_groups_and_both_sets() -> None:
    cost = WeightSaliency(score="ratio", groups=3).cost(tiny_model("llama"), tiny_facts(), RETAIN)
    assert (cost.forwards, cost.backwards) == (18, 18)
    assert (
        dataclasses.replace(WeightSaliency(), groups=2).cost(tiny_model("llama"), tiny_facts()).forwards == 6
    )


def test_a_failed_pass_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    ended = iter([None])

    def logprobs(*given: Any) -> Tensor:
        next(ended)  # the first pass succeeds, the second does not
        return label_logprobs(*given)

    monkeypatch.setattr("tracing.localizers.weight_saliency.label_logprobs", logprobs)
    with pytest.raises(StopIteration):
        WeightSaliency(parameters=(NAME,)).run(model, tiny_facts(), batch_tokens=1)
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())
