"""The count of live bytes, by hand."""

from __future__ import annotations

import torch

from editors.training.live_bytes import LiveBytes


def test_what_is_made_counts_until_it_dies_and_views_count_once() -> None:
    before = torch.zeros(100)
    with LiveBytes() as counted:
        a = before + 1  # 400 bytes
        view = a[:10].reshape(2, 5)
        assert counted.now == counted.peak == 400
        b = torch.ones(50, dtype=torch.float64)  # 400 more
        assert counted.now == 800
        del a
        assert counted.now == 800  # the view holds it
        del view
        assert (counted.now, counted.peak) == (400, 800)
        b.add_(1)
        assert counted.count([before]) == 400 and counted.count([before[:3]]) == 0
        counted.reset_peak()
        assert counted.peak == counted.now == 800


def test_a_backward_is_seen() -> None:
    """y = exp(x) keeps y (40 bytes) for its gradient; the gradient is 40 bytes, and dies with x.grad."""
    x = torch.zeros(10, requires_grad=True)
    with LiveBytes() as counted:
        loss = x.exp().sum()
        assert counted.now == 44
        loss.backward()
        del loss
        assert counted.now == 40
        x.grad = None
        assert counted.now == 0
