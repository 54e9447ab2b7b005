"""Draws depend on seed and step alone; schedules by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from editors.training.settings import Training, draw, lr_at
from locus.errors import InputError


def test_every_pass_shows_every_example_once() -> None:
    seen = Counter(i for step in range(6) for i in draw(0, "retain", step, 12, 4))
    assert seen == Counter({i: 2 for i in range(12)})


def test_draws_need_no_memory() -> None:
    assert draw(3, "retain", 17, 50, 8) == draw(3, "retain", 17, 50, 8)
    assert draw(3, "retain", 17, 50, 8) != draw(3, "retain", 18, 50, 8)
    assert draw(3, "retain", 17, 50, 8) != draw(4, "retain", 17, 50, 8)
    assert draw(3, "retain", 17, 50, 8) != draw(3, "forget", 17, 50, 8)


def test_small_sets_are_seen_whole() -> None:
    assert draw(0, "forget", 5, 3, 8) == [0, 1, 2]
    assert draw(0, "forget", 5, 3, 0) == []
    assert draw(0, "forget", 5, 0, 4) == []


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("cosine", [1.0, 2.0, 2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]),
    ],
)
def test_schedules_by_hand(schedule: str, expected: list[float]) -> None:
    """Two steps of warm-up, then four steps from 2 down to (but not at) 0."""
    training = Training(steps=6, lr=2.0, warmup=2, schedule=schedule)  # type: ignore[arg-type]
    assert [lr_at(training, step) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr = 0.0: must be a positive number"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"clip": -1.0}, "clip = -1.0: must not be negative"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Training(**settings)  # type: ignore[arg-type]
