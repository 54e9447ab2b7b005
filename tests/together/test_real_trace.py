"""On the real weights: every kind and every corruption within float32 rounding of whole forwards."""

from __future__ import annotations

import pytest

from benchmarks.trace_exactness import ALLOWED, distances, questions
from locus.fact import read_facts
from locus.model import load_model


@pytest.mark.real
def test_real_weights_within_rounding() -> None:
    """One cell of each kind for each corruption; `benchmarks.trace_exactness` draws more of them."""
    model = load_model("smollm2", device="cpu", dtype="float32")
    asked = questions(model, read_facts("demo-forget"), samples=1, n_cells=1, seed=1)
    assert len(asked) == 5
    worst = distances(model, [one for both in asked.values() for one in both])
    assert worst.ours_from_plain <= ALLOWED
    assert worst.ours_from_float64 <= max(ALLOWED, 2 * worst.plain_from_float64)
