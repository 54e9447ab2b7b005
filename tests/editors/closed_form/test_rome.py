"""ROME on tiny models: what is written is what was found, where it was asked for and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editors.closed_form.memit import MEMIT
from editors.closed_form.rome import ROME
from editors.key_value.edit_target import EditTarget
from editors.key_value.key_positions import row, states
from editors.key_value.target_value import find_value_deltas
from editors.neurons.neuron_selective import NeuronSelective
from locus.errors import InputError
from locus.forward import measure
from locus.mask import WeightMask
from locus.model import load_model
from tests.editors.direct_edits import ARCHITECTURES, QUICK, TEXT, down, facts, untouched
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_value_found_is_the_value_written(arch: str) -> None:
    model, fact = tiny_model(arch), facts()[0]
    site = model.atlas.neuron_in[1]
    found = find_value_deltas(model, [[fact]], QUICK, site, ())
    with untouched(model):
        delta = ROME(layer=1, target=QUICK).run(model, [fact], [], down(model), text=TEXT)
    assert list(delta.changes) == [down(model, 1).entries and next(iter(down(model, 1).entries))]
    with delta.applied(model):
        now = states(model, [row(model, fact, 0)], outputs=[site])[1][site]
    torch.testing.assert_close(now, found.start + found.delta, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_forgets(arch: str) -> None:
    model, fact = tiny_model(arch), facts()[0]
    new = replace(fact, target=QUICK.refusal)
    before = measure(model, [fact, new]).nll
    with ROME(layer=0, target=QUICK).run(model, [fact], [], down(model), text=TEXT).applied(model):
        after = measure(model, [fact, new]).nll
    assert after[1] < before[1] - 0.3
    assert after[1] < after[0]


def test_a_sequence_does_not_undo_itself() -> None:
    """After three facts, each one's value at the layer is still the one that was found when it was edited."""
    model, three = tiny_model(), [replace(f, held_out=False) for f in facts()]
    site = model.atlas.neuron_in[1]
    editor = ROME(layer=1, target=QUICK)
    outputs = []
    for n in (1, 2, 3):
        with editor.run(model, three[:n], [], down(model), text=TEXT).applied(model):
            rows = [row(model, fact, i) for i, fact in enumerate(three[:n])]
            outputs.append(states(model, rows, outputs=[site])[1][site])
    torch.testing.assert_close(outputs[2][:2], outputs[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs[1][:1], outputs[0], rtol=1e-3, atol=1e-3)


def test_keeps_to_the_neurons_of_the_mask() -> None:
    model, fact = tiny_model(), facts()[0]
    chosen = torch.zeros(3, 48, dtype=torch.bool)
    chosen[1, ::3] = True
    mask = WeightMask.of_neurons(model.atlas, chosen, ("down",), model.fingerprint)
    site = model.atlas.neuron_in[1]
    found = find_value_deltas(model, [[fact]], QUICK, site, ())
    delta = ROME(target=QUICK, ridge=0.01).run(model, [fact], [], mask, text=TEXT)
    assert delta.outside(mask) == 0
    with delta.applied(model):
        now = states(model, [row(model, fact, 0)], outputs=[site])[1][site]
    torch.testing.assert_close(now, found.start + found.delta, rtol=1e-3, atol=1e-3)


def test_retain_facts_make_the_edit_keep_away_from_them() -> None:
    model, (fact, other, _) = tiny_model(), facts()
    site = model.atlas.neuron_in[1]
    rows = [row(model, other, 0)]
    before = states(model, rows, outputs=[site])[1][site]
    moved = []
    for weight in (0.0, 1e4):
        editor = ROME(layer=1, target=QUICK, retain_weight=weight)
        with editor.run(model, [fact], [other], down(model), text=TEXT).applied(model):
            moved.append(float((states(model, rows, outputs=[site])[1][site] - before).norm()))
    assert moved[1] < 0.05 * moved[0]


def test_what_is_wrong_is_said() -> None:
    model, fact = tiny_model(), facts()[0]
    with pytest.raises(InputError, match="has no subject"):
        ROME(target=QUICK).run(model, [replace(fact, subject=None)], [], down(model), text=TEXT)
    with pytest.raises(InputError, match="has no alternatives"):
        ROME(target=EditTarget(to="rewrite", prefixes=0)).run(
            model, [replace(fact, alternatives=())], [], down(model), text=TEXT
        )
    with pytest.raises(InputError, match="layer 2"):
        ROME(layer=2, target=QUICK).run(model, [fact], [], down(model, 0, 1), text=TEXT)
    up = WeightMask.of_neurons(model.atlas, torch.ones(3, 48, dtype=torch.bool), ("up",), model.fingerprint)
    with pytest.raises(InputError, match="no down projection"):
        ROME(target=QUICK).run(model, [fact], [], up, text=TEXT)
    with pytest.raises(InputError, match="context prefixes"):
        ROME(target=EditTarget(prefixes=50)).run(model, [fact], [], down(model), text=TEXT)
    with pytest.raises(InputError, match="lr = 0"):
        EditTarget(lr=0.0)


def test_a_model_edited_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stays = tiny_model()
    folder = save_tiny(stays, tmp_path / "checkpoint")
    model = load_model(folder)
    delta = ROME(layer=1, target=QUICK).run(model, facts()[:1], [], down(model), text=TEXT)
    delta.apply_(model)
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path / "cache"))
    editors: tuple[Any, ...] = (
        ROME(layer=1, target=QUICK),
        MEMIT(layers=(0, 1), target=QUICK),
        NeuronSelective(where="prompt", prefixes=0),
    )
    for editor in editors:
        with pytest.raises(InputError, match="no longer its checkpoint"):
            editor.run(model, facts()[:1], facts()[1:], down(model), text=TEXT)
    assert not (tmp_path / "cache").exists(), "nothing is measured, and nothing kept, before the check"
