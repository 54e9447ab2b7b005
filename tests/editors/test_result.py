"""Stochastic rounding is right on average and lands only on neighbours."""

from __future__ import annotations

import pytest
import torch

from editors.result import stochastically_rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expectation_is_the_exact_value(dtype: torch.dtype) -> None:
    """A quarter of the way from 1 to its next number: up in a quarter of the draws."""
    gap = torch.finfo(dtype).eps
    exact = torch.full((40_000,), 1 + gap / 4)
    rounded = stochastically_rounded(exact, dtype, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + gap}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(rounded.to(dtype).float(), rounded)


def test_what_the_dtype_holds_stays() -> None:
    exact = torch.tensor([0.0, -1.5, 2.0**-120, 3.0])
    assert torch.equal(stochastically_rounded(exact, torch.bfloat16, torch.Generator()), exact)
    wide = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stochastically_rounded(wide, torch.float32, torch.Generator()), wide)


def test_negative_values_round_to_their_own_neighbours() -> None:
    gap = torch.finfo(torch.bfloat16).eps
    exact = torch.full((1000,), -(1 + gap / 2))
    rounded = stochastically_rounded(exact, torch.bfloat16, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {-1.0, -1.0 - gap}
