"""NPO's value, gradient and limits."""

from __future__ import annotations

import math

import pytest
import torch

from editors.objectives.ga import ga_loss
from editors.objectives.npo import NPO, npo_loss
from locus.errors import InputError


def test_value_where_nothing_has_changed_yet() -> None:
    """-(2 / beta) log sigmoid(0) = (2 / beta) ln 2: 20 ln 2 for beta 0.1."""
    nll = torch.tensor([0.3, 4.0, 11.0], dtype=torch.float64)
    assert float(npo_loss(nll, nll, 0.1)) == pytest.approx(20 * math.log(2), abs=1e-12)


def test_value_by_hand() -> None:
    """beta 1, nll - ref = ln 3 and 0: sigmoids 3/4 and 1/2, so -2 (ln 3/4 + ln 1/2) / 2 = ln 8/3."""
    nll = torch.tensor([math.log(3), 1.0], dtype=torch.float64)
    ref = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert float(npo_loss(nll, ref, 1.0)) == pytest.approx(math.log(8 / 3), abs=1e-12)


def test_equals_the_papers_form() -> None:
    """(2 / beta) log(1 + (p / p_ref) ** beta), Zhang et al. 2024, equation 3."""
    p, ref = torch.tensor([0.9, 0.02]).double(), torch.tensor([0.5, 0.4]).double()
    expected = (2 / 0.3 * torch.log(1 + (p / ref) ** 0.3)).mean()
    torch.testing.assert_close(npo_loss(-p.log(), -ref.log(), 0.3), expected, rtol=1e-12, atol=0)


def test_gradient_becomes_gradient_ascents_as_beta_vanishes() -> None:
    nll = torch.tensor([0.3, 4.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([1.0, 0.2], dtype=torch.float64)
    (small,) = torch.autograd.grad(npo_loss(nll, ref, 1e-7), nll)
    (ascent,) = torch.autograd.grad(ga_loss(nll), nll)
    torch.testing.assert_close(small, ascent, rtol=1e-6, atol=0)


def test_a_forgotten_example_is_pushed_no_more() -> None:
    nll = torch.tensor([900.0], dtype=torch.float64, requires_grad=True)
    loss = npo_loss(nll, torch.zeros(1).double(), 0.1)
    (gradient,) = torch.autograd.grad(loss, nll)
    assert 0 <= float(loss.detach()) < 1e-30 and abs(float(gradient)) < 1e-30


def test_gradient_is_right() -> None:
    nll = torch.tensor([0.3, 4.0, 2.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.5, 1.0, 6.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: npo_loss(x, ref, 0.7), nll)


def test_beta_must_be_positive() -> None:
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        npo_loss(torch.zeros(1), torch.zeros(1), 0.0)
    with pytest.raises(InputError, match=r"beta = -1\.0: must be positive"):
        NPO(beta=-1.0)
