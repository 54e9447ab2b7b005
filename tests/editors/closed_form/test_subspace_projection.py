"""Erased subspaces: blind to what was erased, exact on what was protected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from editors.closed_form.subspace_projection import EraseSubspace, subspace, without
from editors.key_value.key_positions import row, states
from locus.errors import InputError
from locus.mask import WeightMask, shapes_of
from tests.editors.direct_edits import ARCHITECTURES, TEXT, facts, untouched
from tests.tiny import tiny_model


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("directions,rank", [("mean", 1), ("pca", 3), ("inlp", 3)])
def test_the_subspace_is_orthonormal_and_outside_what_is_protected(directions: str, rank: int) -> None:
    forget, retain = draw(0, 9, 20) + 1.0, draw(1, 5, 20)
    basis = subspace(forget, retain, directions, rank, 5)  # type: ignore[arg-type]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-8)
    assert float((retain @ basis).abs().max()) < 1e-8
    weight = draw(2, 7, 20)
    edited = weight - without(weight, basis, "input")
    assert float((edited @ basis).abs().max()) < 1e-8
    torch.testing.assert_close(edited @ retain.mT, weight @ retain.mT, rtol=0, atol=1e-8)
    written = draw(3, 20, 7)
    assert float((basis.mT @ (written - without(written, basis, "output"))).abs().max()) < 1e-8


def test_the_mean_difference_by_hand() -> None:
    """Forget mean (1, 1, 0), retain mean (0, 1, 0) along a protected (0, 1, 0): the direction is (1, 0, 0)."""
    forget = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    retain = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    assert subspace(forget, retain, "mean", 1, 1).flatten().abs().tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_inlp_leaves_nothing_for_a_classifier() -> None:
    """Two classes that differ in one direction: once it is gone their means agree."""
    forget, retain = draw(0, 50, 6), draw(1, 50, 6)
    forget[:, 2] += 8.0
    basis = subspace(forget, retain, "inlp", 2, 0)
    gap = (forget - forget @ basis @ basis.mT).mean(0) - (retain - retain @ basis @ basis.mT).mean(0)
    assert float(gap.norm()) < 0.2 * float((forget.mean(0) - retain.mean(0)).norm())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_matrices_lose_what_sets_the_facts_apart(arch: str, side: str) -> None:
    """On the input side the forget fact reads the same as its part without the subspace, retain facts as before."""
    model, (fact, other, _) = tiny_model(arch), facts()
    names = [part.param for part in model.atlas.neurons[1] if not part.role.endswith("bias")]
    shapes = shapes_of(model.module)
    mask = WeightMask.of_parameters(names, shapes, model.fingerprint)
    editor = EraseSubspace(side=side, prefixes=0, protect=1)  # type: ignore[arg-type]
    with untouched(model):
        delta = editor.run(model, [fact], [replace(other, held_out=False)], mask, text=TEXT)
    assert set(delta.changes) == set(mask.entries)
    if side == "input":
        module = names[0].removesuffix(".weight")
        rows = [row(model, other, 0)]
        before = states(model, rows, outputs=[module])[1][module]
        with delta.applied(model):
            after = states(model, rows, outputs=[module])[1][module]
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_said() -> None:
    model, (fact, other, _) = tiny_model(), facts()
    mask = WeightMask.of_parameters(["*.down_proj.weight"], shapes_of(model.module), model.fingerprint)
    with pytest.raises(InputError, match="retain facts"):
        EraseSubspace().run(model, [fact], [], mask, text=TEXT)
    with pytest.raises(InputError, match="rank 1"):
        EraseSubspace(rank=2)
    with pytest.raises(InputError, match="dimensions set the forget facts apart"):
        EraseSubspace(directions="pca", rank=5, prefixes=0).run(model, [fact], [other], mask, text=TEXT)
    norm = WeightMask.of_parameters(["model.norm.weight"], shapes_of(model.module), model.fingerprint)
    with pytest.raises(InputError, match="no matrix"):
        EraseSubspace(prefixes=0).run(model, [fact], [other], norm, text=TEXT)
