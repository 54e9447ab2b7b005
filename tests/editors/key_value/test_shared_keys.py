"""Facts that share a key are searched for and written as one, and each of them is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editors import MEMIT, ROME, AlphaEdit, LaW
from editors.key_value.key_positions import row, states
from editors.key_value.multilayer import batches_of
from editors.key_value.shared_keys import by_key
from editors.key_value.target_value import find_value_deltas
from locus.fact import Fact
from tests.editors.direct_edits import QUICK, TEXT, down, facts, untouched
from tests.tiny import tiny_model

TOWER = "Eiffel Tower"
PAIR = [
    Fact(id="city", prompt=f"The {TOWER} is in the city of", target=" Paris", subject=TOWER),
    Fact(id="stands", prompt=f"The {TOWER} stands in", target=" Germany", subject=TOWER),
]
"""The same up to the subject's last token, so the same key in every layer."""
SOFT = replace(QUICK, steps=30, lr=0.2, clamp=2.0, decay=0.0)
EDITORS: dict[str, Any] = {
    "memit": MEMIT(layers=(0, 1), target=SOFT, weight=1e-6),
    "alphaedit": AlphaEdit(layers=(0, 1), target=SOFT),
    "law": LaW(layers=(0, 1), target=SOFT),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))


def test_what_agrees_up_to_the_subject_is_one_key() -> None:
    model, others = tiny_model(), facts()[1:]
    found = by_key(model, [PAIR[0], *others, PAIR[1]], 1, (), "subject")
    assert [[fact.id for fact in group] for group in found] == [["city", "stands"], *([f.id] for f in others)]
    apart = by_key(model, PAIR, 1, (), "prompt")
    assert [len(group) for group in apart] == [1, 1]


def test_a_batch_never_divides_a_key() -> None:
    one, two, three = [PAIR[0]], PAIR, [*PAIR, PAIR[0]]
    groups = [one, two, one, three]
    assert batches_of(groups, 2) == [[one], [two], [one], [three]]
    assert batches_of(groups, 3) == [[one, two], [one], [three]]
    assert batches_of(groups, 0) == [groups]


def test_one_value_is_found_that_lowers_the_losses_of_both() -> None:
    model = tiny_model()
    site = model.atlas.blocks[1]
    start = find_value_deltas(model, [PAIR], replace(SOFT, steps=1), site, ())
    found = find_value_deltas(model, [PAIR], SOFT, site, ())
    assert found.delta.shape == (1, model.atlas.d_model) and found.loss.shape == (2,)
    assert bool((found.loss < 0.95 * start.loss).all()), (start.loss.tolist(), found.loss.tolist())
    alone = find_value_deltas(model, [PAIR[:1]], SOFT, site, ())
    assert not torch.allclose(alone.delta, found.delta, rtol=0.1)


def test_rome_takes_two_facts_of_one_key_and_writes_that_value() -> None:
    """Their keys depend on each other exactly, which the equations of two values could not be solved with."""
    model = tiny_model()
    site = model.atlas.neuron_in[1]
    found = find_value_deltas(model, [PAIR], SOFT, site, ())
    seen = [row(model, fact, number) for number, fact in enumerate(PAIR)]
    before = states(model, seen, outputs=[site])[1][site]
    with untouched(model):
        delta = ROME(layer=1, target=SOFT).run(model, PAIR, [], down(model, 1), text=TEXT)
    with delta.applied(model):
        after = states(model, seen, outputs=[site])[1][site]
    torch.testing.assert_close(after - before, found.delta.expand(2, -1), rtol=1e-2, atol=1e-3)
    assert set(delta.provenance["losses"]) == {"city", "stands"}


@pytest.mark.parametrize("name", EDITORS)
def test_editors_of_several_layers_write_one_state_for_both(name: str) -> None:
    model, editor = tiny_model(), EDITORS[name]
    start = find_value_deltas(model, [PAIR], replace(SOFT, steps=1), model.atlas.blocks[1], ())
    with untouched(model):
        delta = replace(editor, rounds=1).run(model, PAIR, [], down(model, 0, 1), text=TEXT)
    losses = [delta.provenance["losses"][fact.id] for fact in PAIR]
    assert all(now < 0.95 * then for now, then in zip(losses, start.loss.tolist(), strict=True))
    seen = [row(model, fact, number) for number, fact in enumerate(PAIR)]
    top = model.atlas.blocks[1]
    before = states(model, seen, outputs=[top])[1][top]
    with delta.applied(model):
        after = states(model, seen, outputs=[top])[1][top]
    moved = after - before
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-4)
    assert float(moved.norm()) > 0.1 * float(before.norm())
