"""Sophia-G by hand."""

from __future__ import annotations

import torch
from torch import nn

from editors.training.sophia import SophiaG


def test_two_steps_by_hand() -> None:
    """beta 0.5/0.5, rho 0.1, lr 0.1, decay 0.

    Hessian gradient 2 on n = 5 labels: h = 0.5 * 5 * 4 = 10, rho h = 1.
    Step 1, gradient 1: m = 0.5, m / 1 = 0.5, theta = 1 - 0.05 = 0.95.
    Step 2, gradient 8: m = 4.25, clipped to 1, theta = 0.95 - 0.1 = 0.85.
    """
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = SophiaG([p], lr=0.1, betas=(0.5, 0.5), rho=0.1)
    p.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.update_hessian(5)
    for gradient, expected in ((1.0, 0.95), (8.0, 0.85)):
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor([expected], dtype=torch.float64))


def test_without_a_hessian_steps_are_signs_and_decay_is_decoupled() -> None:
    p = nn.Parameter(torch.tensor([2.0, -2.0, 2.0]))
    optimizer = SophiaG([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.tensor([3.0, -1e-4, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.8, -1.8, 1.9]))
