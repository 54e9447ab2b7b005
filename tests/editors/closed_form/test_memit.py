"""MEMIT, AlphaEdit and LaW on tiny models."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editors.closed_form.alphaedit import AlphaEdit
from editors.closed_form.knowledge_washing import LaW, wash
from editors.closed_form.memit import MEMIT
from editors.key_value.key_positions import row, states
from editors.key_value.least_squares import SecondMomentMetric, least_squares_update
from editors.key_value.residual_spread import before_norm
from editors.key_value.second_moments import second_moments
from locus.errors import InputError
from locus.forward import measure
from tests.editors.direct_edits import ARCHITECTURES, QUICK, TEXT, down, facts, untouched
from tests.tiny import tiny_model

TARGET = replace(QUICK, lr=0.2, clamp=1.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_brings_the_states_about(arch: str) -> None:
    """Two layers, hardly any weight on the text: the state wanted after the upper one is there."""
    model, two = tiny_model(arch), facts()[:2]
    with untouched(model):
        delta = MEMIT(layers=(0, 1), target=TARGET, weight=1e-6).run(model, two, [], down(model), text=TEXT)
    assert set(delta.changes) == set(down(model, 0, 1).entries)
    missing = delta.provenance["missing"].values()
    assert max(missing) < (0.9 if arch == "gemma2" else 0.02)  # a norm's output has a length of its own
    news = [replace(fact, target=TARGET.refusal) for fact in two]
    before = measure(model, news).nll
    with delta.applied(model):
        assert bool((measure(model, news).nll < before).all())


def test_the_weight_trades_what_is_written_for_what_is_kept() -> None:
    model, two = tiny_model(), facts()[:2]
    missing, norms = [], []
    for weight in (1e-6, 0.1, 10.0):
        delta = MEMIT(layers=(0, 1), target=TARGET, weight=weight).run(model, two, [], down(model), text=TEXT)
        missing.append(max(delta.provenance["missing"].values()))
        norms.append(delta.norm)
    assert missing == sorted(missing)
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("editor", [MEMIT, AlphaEdit])
def test_batches_leave_earlier_ones_where_they_are(editor: type) -> None:
    """The second of two batches hardly moves what the top layer's projection gives for the first one."""
    model, two = tiny_model(), facts()[:2]
    settings = {"layers": (1,), "target": TARGET, "batch": 1}
    settings |= {"weight": 1e-6} if editor is MEMIT else {"threshold": 50.0, "l2": 1e-6}
    site = model.atlas.neuron_in[1]
    values = []
    for n in (1, 2):
        with editor(**settings).run(model, two[:n], [], down(model), text=TEXT).applied(model):
            values.append(states(model, [row(model, two[0], 0)], outputs=[site])[1][site])
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("editor", [MEMIT, AlphaEdit])
def test_what_the_model_still_says_is_written_again(editor: type) -> None:
    """With little written in a round, each comes closer to what is aimed at; a forgotten fact is left alone."""
    model, two = tiny_model(), facts()[:2]
    news = [replace(fact, target=TARGET.refusal) for fact in two]
    settings = {"layers": (1,), "target": TARGET}
    settings |= {"weight": 100.0} if editor is MEMIT else {"threshold": 50.0, "l2": 20.0}
    losses, probs = [measure(model, news).nll.mean()], measure(model, two).prob
    for rounds in (1, 3):
        made = editor(**settings, rounds=rounds, forgotten=0.0).run(model, two, [], down(model), text=TEXT)
        assert made.provenance["rounds"] == {fact.id: rounds for fact in two}
        assert made.provenance["remaining"] == [fact.id for fact in two]
        with made.applied(model):
            losses.append(measure(model, news).nll.mean())
            probs = measure(model, two).prob if rounds == 1 else probs
    assert all(later < sooner for sooner, later in itertools.pairwise(losses)), losses
    made = editor(**settings, rounds=2, forgotten=float(probs.mean())).run(
        model, two, [], down(model), text=TEXT
    )
    again = [made.provenance["rounds"][fact.id] == 2 for fact in two]
    assert again == (probs > probs.mean()).tolist()
    assert sum(again) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_alphaedit_hardly_moves_text(arch: str) -> None:
    model, fact = tiny_model(arch), facts()[0]
    with untouched(model):
        delta = AlphaEdit(layers=(1,), target=TARGET, threshold=0.1).run(
            model, [fact], [], down(model), text=TEXT
        )
    (change,) = delta.changes.values()
    update = torch.zeros(change.selection.shape, dtype=torch.float64)
    change.selection.put_(update, (change.new.double() - change.old.double()))
    update = update if update.shape[1] == 48 else update.mT
    moment = second_moments(model, [1], TEXT)[1].mean
    moved = float(((update @ moment) * update).sum())
    blind = float(update.square().sum() * moment.trace() / 48)  # the same update in random directions
    assert 0 < moved < 0.15 * blind


def test_norms_are_seen_through() -> None:
    """A change that the norm can make is brought about exactly."""
    model, fact = tiny_model("gemma2"), facts()[0]
    rows = [row(model, fact, 0)]
    site, added = model.atlas.neuron_in[1], model.atlas.mlp_out[1]
    norm = model.module.get_submodule(added)
    now = states(model, rows, outputs=[site])[1][site].float()
    there = now + 0.3 * now.norm() / 32**0.5 * torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    change = (norm(there) - norm(now)).double()
    delta = before_norm(model, 1, rows, change)
    torch.testing.assert_close(
        norm((now + delta).float()).double() - norm(now).double(), change, rtol=0, atol=1e-3
    )
    plain = tiny_model("llama")
    assert before_norm(plain, 1, [row(plain, fact, 0)], change) is change


def test_law_climbs_within_its_budget() -> None:
    """More is done to the keys than by MEMIT's update, at exactly beta times its cost."""
    source = torch.Generator().manual_seed(0)
    k = torch.randn(12, 40, generator=source, dtype=torch.float64)
    keys, residual = k[:, :4].clone(), torch.randn(5, 4, generator=source, dtype=torch.float64)
    metric = SecondMomentMetric.of(k @ k.mT / 40, 1e-3)
    start = least_squares_update(metric, keys, residual, 0.5)
    assert torch.equal(wash(metric, keys, residual, 0.5, 1.1, 0), start)
    done = [float((start @ keys).square().sum())]
    for climb in (1, 5, 200):
        update = wash(metric, keys, residual, 0.5, 1.1, climb)
        assert metric.cost(update) == pytest.approx(1.1 * metric.cost(start), rel=1e-8)
        done.append(float((update @ keys).square().sum()))
    assert done == sorted(done)
    # The most that a budget buys: all of it on the largest eigenvalue of Kᵀ C⁻¹ K.
    most = 1.1 * metric.cost(start) * float(torch.linalg.eigvalsh(keys.mT @ metric.solve(keys))[-1])
    assert done[-1] == pytest.approx(most, rel=1e-6)


def test_law_goes_on_with_the_facts_that_are_left() -> None:
    model, two = tiny_model(), facts()[:2]
    with untouched(model):
        delta = LaW(layers=(0, 1), target=TARGET, rounds=3, forgotten=1e-9).run(
            model, two, [], down(model), text=TEXT
        )
    assert delta.provenance["rounds"] == {fact.id: 3 for fact in two}
    assert delta.provenance["remaining"] == [fact.id for fact in two]
    with pytest.raises(InputError, match="beta"):
        LaW(layers=(0,), target=TARGET, beta=0.5).run(model, two, [], down(model), text=TEXT)
