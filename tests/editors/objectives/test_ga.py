"""Gradient ascent's value and gradient."""

from __future__ import annotations

import torch

from editors.objectives.ga import ga_loss


def test_is_the_negated_cross_entropy() -> None:
    nll = torch.tensor([1.0, 4.0], dtype=torch.float64, requires_grad=True)
    loss = ga_loss(nll)
    assert float(loss.detach()) == -2.5
    (gradient,) = torch.autograd.grad(loss, nll)
    assert gradient.tolist() == [-0.5, -0.5]
    assert torch.autograd.gradcheck(ga_loss, nll)
