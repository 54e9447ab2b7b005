"""Forwards begun at the prefix are the whole forwards: logits and gradients, on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import editors.key_value.prefix
from editors.key_value import target_value as target_value
from editors.key_value.key_positions import KeyRow, Place, rows
from editors.key_value.prefix import SuffixForwards, WholeForwards, delta_forwards
from editors.key_value.target_value import find_value_deltas
from locus.model import Model
from tests.editors.direct_edits import QUICK, facts
from tests.tiny import ARCHITECTURES, tiny_model

PREFIXES = ("Germany is not far.", "It stands in the city.")


def asked(model: Model, place: Place = "subject") -> list[KeyRow]:
    """Three facts of unlike lengths, plain and after context prefixes; one begins with its subject."""
    first = replace(facts()[0], prompt="Paris is in the country of", target=" Germany", subject="Paris")
    return rows(model, [replace(first, subject_start=0), *facts()[1:]], PREFIXES, place)


def answered(forwards: Any, due: list[int], delta: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Each row's logits, and the gradient of a number made of all of them."""
    delta = delta.clone().requires_grad_()
    found, total = {}, torch.zeros(())
    for batch, logits in forwards(due, delta):
        for i in set(batch.example.tolist()):
            assert i not in found
            found[i] = logits[batch.example == i].detach()
            total = total + (i + 1) * logits[batch.example == i].log_softmax(-1)[:, :7].sum()
    (slope,) = torch.autograd.grad(total, delta)
    return found, slope


@pytest.mark.parametrize("place", ["subject", "prompt"])
@pytest.mark.parametrize("where", ["block", "projection", "first block"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_as_whole_forwards(arch: str, where: str, place: Place) -> None:
    model = tiny_model(arch)
    sites: dict[str, str] = {
        "block": model.atlas.blocks[1],
        "projection": model.atlas.neuron_in[1],
        "first block": model.atlas.neuron_in[0],
    }
    chosen = asked(model, place)
    delta = torch.randn(3, model.atlas.d_model, generator=torch.Generator().manual_seed(0))
    made = delta_forwards(model, sites[where], chosen, 4096)
    assert isinstance(made, SuffixForwards)
    for due in (list(range(len(chosen))), [0, 4, 5], [2]):
        now, slope = answered(made, due, delta)
        then, wanted = answered(WholeForwards(model, sites[where], chosen, 4096), due, delta)
        assert sorted(now) == sorted(then) == due
        for i in due:
            torch.testing.assert_close(now[i], then[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-3)


def test_small_batches_are_the_same() -> None:
    model = tiny_model("gpt2")
    chosen = asked(model)
    delta = torch.randn(3, model.atlas.d_model, generator=torch.Generator().manual_seed(0))
    due = list(range(len(chosen)))
    one, all_of_them = (
        answered(delta_forwards(model, model.atlas.blocks[0], chosen, n), due, delta) for n in (1, 4096)
    )
    for i in due:
        torch.testing.assert_close(one[0][i], all_of_them[0][i], rtol=1e-4, atol=1e-4)


def test_nothing_below_the_shift_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tokens from the subject's last on, and only the blocks above."""
    model = tiny_model()
    chosen = asked(model)
    made = delta_forwards(model, model.atlas.blocks[1], chosen, 4096)
    seen: list[tuple[int, torch.Size]] = []

    def watched(layer: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **more: Any) -> Any:
            seen.append((layer, hidden.shape))
            return own(hidden, *args, **more)

        return run

    for layer, path in enumerate(model.atlas.blocks):
        block = model.module.get_submodule(path)
        monkeypatch.setattr(block, "forward", watched(layer, block.forward))
    list(made([0], torch.zeros(3, 32)))
    assert seen == [(2, torch.Size([1, len(chosen[0].encoded.ids) - chosen[0].position - 1, 32]))]


def test_a_model_that_does_not_come_out_the_same_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because its cache forgets; the deltas found are those of whole forwards."""
    model, three = tiny_model(), facts()
    site = model.atlas.blocks[0]
    good = find_value_deltas(model, [[fact] for fact in three], QUICK, site, PREFIXES)
    honest = editors.key_value.prefix._before
    monkeypatch.setattr(
        editors.key_value.prefix, "_before", lambda tensor, starts: 0.5 * honest(tensor, starts)
    )
    assert isinstance(delta_forwards(model, site, asked(model), 4096), WholeForwards)
    found = find_value_deltas(model, [[fact] for fact in three], QUICK, site, PREFIXES)
    assert good.from_prefix and not found.from_prefix
    torch.testing.assert_close(found.delta, good.delta, rtol=1e-2, atol=1e-3)


def test_facts_are_searched_for_in_portions_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts do not see each other, so a portion at a time finds the same."""
    model, three = tiny_model(), facts()
    at_once = find_value_deltas(model, [[fact] for fact in three], QUICK, model.atlas.blocks[1], PREFIXES)
    monkeypatch.setattr(target_value, "MOST_KEPT", 1)
    found = find_value_deltas(model, [[fact] for fact in three], QUICK, model.atlas.blocks[1], PREFIXES)
    torch.testing.assert_close(found.delta, at_once.delta, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.loss, at_once.loss, rtol=1e-3, atol=1e-3)
    assert found.steps == at_once.steps
