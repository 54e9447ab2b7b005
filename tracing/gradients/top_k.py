"""The k largest of very many scores, without sorting them.

Float32 bits, taken as integers with the sign folded in, order as the floats do. Their upper 16 bits are counted
in one pass over the tensors, the lower 16 bits of the one bin that holds the k-th in a second: exact, with two
tables of 65,536 counts and one chunk of work space, whatever the number of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.errors import InputError

_CHUNK = 1 << 20
_BINS = 1 << 16
_HALF = _BINS >> 1


def kth_largest(scores: Callable[[], Iterable[Tensor]], k: int) -> tuple[float, int]:
    """Threshold of the k largest scores.

    Args:
        scores: Gives the score tensors, of any shapes and dtypes, the same at each call; it is called twice.
        k: How many, from 1 to the number of scores.

    Returns:
        The k-th largest score, and how many scores equal to it belong to the k.

    Raises:
        InputError: a score is NaN.
        ValueError: k is not between 1 and the number of scores.
    """
    upper = torch.zeros(_BINS, dtype=torch.long)
    for keys in _keys(scores()):
        upper += torch.bincount((keys >> 16) + _HALF, minlength=_BINS).cpu()
    if not 1 <= k <= int(upper.sum()):
        raise ValueError(f"k is {k} of {int(upper.sum())} scores")
    bin_, above = _bin_of(upper, k)
    lower = torch.zeros(_BINS, dtype=torch.long)
    for keys in _keys(scores()):
        inside = keys[keys >> 16 == bin_ - _HALF]
        lower += torch.bincount(inside & (_BINS - 1), minlength=_BINS).cpu()
    low, above_inside = _bin_of(lower, k - above)
    return _float_of((bin_ << 16) + low), k - above - above_inside


def top_of(scores: Mapping[str, Tensor], k: int) -> Iterator[tuple[str, Bool[Tensor, "..."]]]:
    """Where the k largest scores are, tensor by tensor; ties go to the first tensor, then the first element.

    Raises:
        InputError: a score is NaN.
        ValueError: k is not between 1 and the number of scores.
    """
    threshold, ties = kth_largest(scores.values, k)
    for name, tensor in scores.items():
        chosen = tensor > threshold
        if ties:
            equal = (tensor == threshold).flatten().nonzero().flatten()[:ties]
            chosen.view(-1)[equal] = True
            ties -= len(equal)
        yield name, chosen


def _keys(tensors: Iterable[Tensor]) -> Iterator[Int[Tensor, " chunk"]]:
    """Integers from -2^31 to 2^31 - 1 that order as the scores do, a chunk at a time."""
    for tensor in tensors:
        for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
            values = chunk.float() + 0.0  # so that -0.0 is 0.0
            if bool(values.isnan().any()):
                raise InputError("NaN among the scores: the gradients are not finite; try --dtype float32")
            bits = values.view(torch.int32)
            yield bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats grow with their bits: turn them round


def _bin_of(counts: Int[Tensor, " bin"], k: int) -> tuple[int, int]:
    """The bin of the k-th largest, and how many scores lie in bins above it."""
    from_above = counts.flip(0).cumsum(0)
    index = int((from_above < k).sum())
    above = int(from_above[index - 1]) if index else 0
    return _BINS - 1 - index, above


def _float_of(key: int) -> float:
    bits = key - (1 << 31)
    if bits < 0:
        bits = (-bits - 1) | -(1 << 31)
    value: Float[Tensor, ""] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return float(value)
