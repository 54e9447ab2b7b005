"""How sure a figure is: means with bootstrap intervals over facts, paired where two states saw the same items.

Items of one fact (three paraphrases, the tokens of one paragraph) are not independent, so facts are
resampled, not items.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 4000
_Z = 1.959963984540054  # two-sided 95 % of a normal

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Items:
    """One value for each thing that was measured, and the fact (or paragraph) it belongs to."""

    groups: tuple[str, ...]
    """Fact or paragraph of each item: what is resampled."""
    values: Float[Tensor, " item"]
    """The values; a yes or no is 1 or 0."""

    def __post_init__(self) -> None:
        if len(self.groups) != len(self.values):
            raise ValueError(f"{len(self.groups)} groups for {len(self.values)} values")

    @property
    def binary(self) -> bool:
        """Whether every value is 0 or 1."""
        return bool(((self.values == 0) | (self.values == 1)).all())


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with 95 % confidence."""

    mean: float
    low: float
    high: float
    n: int
    """Facts or paragraphs behind it."""
    n_items: int
    """Values behind it."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def mean_interval(items: Items, seed: int = 0, share: bool = True) -> Interval | None:
    """Mean of the items with a percentile bootstrap interval over groups; None without items.

    Where every item is the same yes or no, a bootstrap would claim certainty: Wilson's interval for that
    many groups is given instead (0 of 16 is 0 to 19 %), and likewise wherever each group has a single yes
    or no. `share` is False for values that are no yes or no although they may all be 0, as a divergence is.
    """
    if len(items.values) == 0:
        return None
    sums, counts = _grouped(items)
    n, n_items = len(sums), len(items.values)
    mean = float(sums.sum() / counts.sum())
    if not math.isfinite(mean):
        return Interval(mean, mean, mean, n, n_items)
    if share and items.binary and (n == n_items or mean in (0.0, 1.0)):
        return Interval(mean, *wilson(mean * n, n), n, n_items)
    draws = _draws(n, seed)
    means = (draws @ sums) / (draws @ counts)
    return Interval(mean, *_ends(means), n, n_items)


def difference(after: Items, before: Items, seed: int = 0) -> Interval | None:
    """Mean of after - before over the same items, with a paired bootstrap interval over groups.

    Raises:
        ValueError: the two are not of the same items.
    """
    _check_paired(after, before)
    if len(after.values) == 0:
        return None
    delta = _minus(after.values, before.values)
    if not torch.isfinite(delta).all():
        mean = float(delta.mean())
        return Interval(mean, mean, mean, len(set(after.groups)), len(delta))
    sums, counts = _grouped(Items(after.groups, delta))
    draws = _draws(len(sums), seed)
    means = (draws @ sums) / (draws @ counts)
    return Interval(float(sums.sum() / counts.sum()), *_ends(means), len(sums), len(delta))


def ratio(after: Items, before: Items, seed: int = 0) -> Interval | None:
    """Mean of `after` over the mean of `before`, paired; None without items or where the divisor can be 0."""
    _check_paired(after, before)
    if len(after.values) == 0 or not torch.isfinite(torch.cat([after.values, before.values])).all():
        return None
    top, counts = _grouped(after)
    bottom, _ = _grouped(before)
    draws = _draws(len(counts), seed)
    divisors = draws @ bottom
    if bottom.sum() <= 0 or (divisors <= 0).any():
        return None
    return Interval(
        float(top.sum() / bottom.sum()), *_ends((draws @ top) / divisors), len(counts), len(after.values)
    )


def gain(edit: Items, controls: Sequence[Items], seed: int = 0) -> Interval | None:
    """Mean of edit - (mean over the controls), paired by item; facts and controls are both resampled.

    With few controls the interval cannot know how much masks differ from one another: more seeds make it
    honest, not narrower.
    """
    if not controls or len(edit.values) == 0:
        return None
    for control in controls:
        _check_paired(edit, control)
    deltas = [_minus(edit.values, control.values) for control in controls]
    n = len(set(edit.groups))
    if not all(torch.isfinite(delta).all() for delta in deltas):
        mean = float(torch.stack(deltas).mean())
        return Interval(mean, mean, mean, n, len(edit.values))
    grouped = [_grouped(Items(edit.groups, delta)) for delta in deltas]
    sums, counts = np.stack([sums for sums, _ in grouped]), grouped[0][1]
    facts = _draws(n, seed)
    masks = _draws(len(controls), seed + 1)
    means = ((facts @ sums.T) * masks).sum(1) / len(controls) / (facts @ counts)
    return Interval(float(sums.mean(0).sum() / counts.sum()), *_ends(means), n, len(edit.values))


def wilson(successes: float | int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (1927)."""
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)


def _minus(after: Tensor, before: Tensor) -> Tensor:
    """after - before in float64, where two infinities of one sign are equal."""
    return torch.where(after == before, 0.0, after.double() - before.double())


def _grouped(items: Items) -> tuple[Array, Array]:
    """Sum and number of the items of each group, groups in order of first appearance."""
    index = {group: i for i, group in enumerate(dict.fromkeys(items.groups))}
    owner = np.array([index[group] for group in items.groups])
    values = items.values.double().numpy()
    sums: Array = np.bincount(owner, weights=values).astype(np.float64)
    return sums, np.bincount(owner).astype(np.float64)


@functools.lru_cache(maxsize=8)
def _draws(n: int, seed: int) -> Array:
    """How often each of n groups is drawn in each resample; the same for every figure of as many groups."""
    size = max(500, min(RESAMPLES, 20_000_000 // n))
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
    drawn.flags.writeable = False
    return drawn


def _ends(means: Array) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _check_paired(a: Items, b: Items) -> None:
    if a.groups != b.groups:
        raise ValueError("paired comparison of different items")
