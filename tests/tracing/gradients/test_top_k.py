import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locus.errors import InputError
from tracing.gradients.top_k import kth_largest, top_of

finite = st.floats(width=32, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=1, max_size=30), st.data())
def test_equals_sorting(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    cut = data.draw(st.integers(0, len(values)))
    tensors = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])}
    threshold, ties = kth_largest(tensors.values, k)
    ordered = sorted(values, reverse=True)
    assert threshold == ordered[k - 1]
    assert ties == k - sum(value > threshold for value in values)


def test_chooses_exactly_k_and_breaks_ties_by_place() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([2.0, 5.0])}
    chosen = dict(top_of(scores, 4))
    assert chosen["a"].tolist() == [[True, False], [True, True]]
    assert chosen["b"].tolist() == [False, True]


def test_sixteen_bit_scores_and_zeros_of_both_signs() -> None:
    scores = {"a": torch.tensor([-0.0, 0.0, -1.0, 1.0], dtype=torch.bfloat16)}
    assert dict(top_of(scores, 3))["a"].tolist() == [True, True, False, True]


def test_refuses_nan_and_impossible_counts() -> None:
    with pytest.raises(InputError, match="NaN"):
        kth_largest(lambda: [torch.tensor([1.0, float("nan")])], 1)
    with pytest.raises(ValueError, match="k is 3 of 2"):
        kth_largest(lambda: [torch.zeros(2)], 3)
