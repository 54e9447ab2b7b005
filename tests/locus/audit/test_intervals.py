"""Intervals: exact where a formula exists, against a slow resampling elsewhere, and honest at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locus.audit.intervals import Items, difference, gain, mean_interval, ratio, wilson


def _items(values: list[float], groups: list[str] | None = None) -> Items:
    return Items(tuple(groups or [str(i) for i in range(len(values))]), torch.tensor(values))


def test_wilson_of_none_of_sixteen() -> None:
    """z^2 / (n + z^2) = 3.8415 / 19.8415."""
    assert wilson(0, 16) == pytest.approx((0.0, 0.19361), abs=1e-4)
    assert wilson(16, 16) == pytest.approx((1 - 0.19361, 1.0), abs=1e-4)
    assert wilson(8, 16)[0] == pytest.approx(1 - wilson(8, 16)[1])


def test_a_bootstrap_never_claims_certainty_of_a_share() -> None:
    interval = mean_interval(_items([0.0] * 12))
    assert interval is not None and interval.low == 0 and interval.high > 0.2
    three_each = mean_interval(_items([1.0] * 12, [str(i // 3) for i in range(12)]))
    assert three_each is not None and (three_each.n, three_each.n_items) == (4, 12)
    assert three_each.low == pytest.approx(wilson(4, 4)[0])


def test_items_of_one_fact_are_resampled_together() -> None:
    """Four copies of each value say no more than one: the interval must not shrink by half."""
    values = torch.rand(12, generator=torch.Generator().manual_seed(1)).tolist()
    once = mean_interval(_items(values))
    copied = mean_interval(
        _items([v for v in values for _ in range(4)], [str(i) for i in range(12) for _ in range(4)])
    )
    assert once is not None and copied is not None
    assert (copied.mean, copied.low, copied.high) == pytest.approx((once.mean, once.low, once.high))
    assert (copied.n, copied.n_items) == (12, 48)


def test_the_interval_is_scipys_bootstrap_and_a_further_fact() -> None:
    """A fact of weight 1/2 at 0 or 1 beside 30 moves an end outwards by about (1/2) / 30.5 times its distance."""
    from scipy.stats import bootstrap

    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    ours = mean_interval(_items(values.tolist()))
    theirs = bootstrap(
        (values.numpy(),), np.mean, method="percentile", n_resamples=9999, rng=0
    ).confidence_interval
    assert ours is not None
    wider = 0.5 * 0.5 / 30.5
    assert (ours.low, ours.high) == pytest.approx((theirs.low - wider, theirs.high + wider), abs=0.012)


def test_pairing_finds_a_small_shift_that_unpaired_intervals_cannot() -> None:
    before = torch.linspace(0, 1, 20)
    shift = difference(_items((before - 0.05).tolist()), _items(before.tolist()))
    assert shift is not None and shift.excludes_zero and shift.mean == pytest.approx(-0.05)
    alone = mean_interval(_items(before.tolist()))
    assert alone is not None and alone.high - alone.low > 0.2


def test_nothing_changed_is_zero_and_does_not_exclude_zero() -> None:
    same = difference(_items([0.2, 0.7]), _items([0.2, 0.7]))
    assert same is not None and (same.mean, same.low, same.high) == (0, 0, 0) and not same.excludes_zero
    both_broken = difference(_items([math.inf, 0.7]), _items([math.inf, 0.7]))
    assert both_broken is not None and both_broken.mean == 0


def test_a_model_without_numbers_is_infinitely_worse_not_missing() -> None:
    worse = difference(_items([math.inf, 1.0]), _items([1.0, 1.0]))
    assert worse is not None and worse.mean == math.inf and worse.excludes_zero


def test_ratio_by_hand_and_without_a_divisor() -> None:
    kept = ratio(_items([1.0, 0.0, 1.0, 1.0]), _items([1.0, 1.0, 1.0, 1.0]))
    assert kept is not None and kept.mean == 0.75 and kept.high <= 1
    assert ratio(_items([0.0, 0.0]), _items([0.0, 0.0])) is None
    assert ratio(_items([]), _items([])) is None


def test_gain_is_against_the_mean_of_the_controls_and_wider_than_against_one() -> None:
    edit = _items([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    low, high = _items([0.0] * 6), _items([1.0] * 6)
    both = gain(edit, [low, high])
    assert both is not None and both.mean == pytest.approx(5 / 6 - 0.5)
    alone = gain(edit, [low])
    assert alone is not None and alone.excludes_zero
    assert not both.excludes_zero, "two controls that differ by 1 cannot show a gain of 1/3"
    assert gain(edit, []) is None


def test_only_the_same_items_can_be_paired() -> None:
    with pytest.raises(ValueError, match="different items"):
        difference(_items([1.0], ["a"]), _items([1.0], ["b"]))
    with pytest.raises(ValueError, match="2 groups for 1"):
        Items(("a", "b"), torch.zeros(1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20))
def test_the_mean_lies_in_its_interval(values: list[float]) -> None:
    interval = mean_interval(_items(values))
    assert interval is not None
    assert interval.low - 1e-6 <= interval.mean <= interval.high + 1e-6
    assert interval.mean == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_a_divergence_of_zero_is_no_answer_of_no() -> None:
    zeros = Items(tuple("abcdef"), torch.zeros(6))
    share, nats = mean_interval(zeros), mean_interval(zeros, share=False)
    assert share is not None and share.high > 0.3
    assert nats is not None and (nats.mean, nats.low, nats.high) == (0.0, 0.0, 0.0)
