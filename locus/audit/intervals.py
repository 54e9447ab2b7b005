"""How sure a figure is: means with 95 % intervals over facts, paired where two states saw the same items.

What is left after an edit is skewed: most facts are at 1e-4 and one in ten leaks. Among few facts the leak is often not
seen at all, and a percentile bootstrap then claims near certainty: it covered the truth in half of such draws. Here
every interval allows for the fact that was not drawn:

    a mean        Bayesian bootstrap (Rubin 1981) over facts, with one more fact of weight 1/2 at the worst value that
                  each end allows: 0 and 1 for shares and probabilities; for values without bounds (nats), twice the
                  observed range beyond the extremes. Of weight 1 the bounded form is Gaffke's bound (2005), which for
                  yes and no is Clopper and Pearson's; of weight 1/2 it is close to Jeffreys' interval.
    a share       Wilson's interval (1927) where each fact is a single yes or no
    a difference  from the intervals of the two means and their correlation over facts (Zou & Donner 2008, "MOVER"),
                  which for shares is Newcombe's interval (1998); of unbounded values the bootstrap of the differences
    a ratio       the Bayesian bootstrap of pairs; the further fact is kept whole, or lost whole

Measured coverage is .90 or more from 6 facts on (tests/locus/audit/test_coverage.py); from few facts the intervals are
wide, because they have to be: 6 facts that all came out at 0 leave room for a third of the others. Items of one fact
(three paraphrases, the tokens of one paragraph) are not independent, so facts are resampled, not items.
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
UNSEEN = 0.5
"""Weight of the further fact at the end of a bounded range, in facts."""
BEYOND = 2.0
"""How far beyond the extremes the further fact of an unbounded value lies, in observed ranges; its weight is 1."""
PRIOR_PAIRS = 2.0
"""Pairs without any correlation that are counted beside those observed: few pairs always look alike."""
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
    """Mean of the items with its 95 % interval; None without items.

    Args:
        items: The values and the fact of each.
        seed: Seed of the resampling.
        share: Whether the values are shares or probabilities, with 0 and 1 as their bounds. False for values in nats,
            which may all be 0 without being a "no".
    """
    if len(items.values) == 0:
        return None
    n = len(set(items.groups))
    if not torch.isfinite(items.values).all():
        mean = float(items.values.double().mean())
        return Interval(mean, mean, mean, n, len(items.values))
    return _mean(_Sample.of(items), items.binary, seed, share and _within_unit(items))


def difference(after: Items, before: Items, seed: int = 0, share: bool = True) -> Interval | None:
    """Mean of after - before over the same items, with its 95 % interval.

    Where no pair differs in any bit the interval is zero wide, except for a yes or no.

    Args:
        after: The values, paired with those of `before`.
        before: The values they are compared with.
        seed: Seed of the resampling.
        share: As in `mean_interval`.

    Raises:
        ValueError: the two are not of the same items.
    """
    _check_paired(after, before)
    if len(after.values) == 0:
        return None
    delta = _minus(after.values, before.values)
    n = len(set(after.groups))
    if not torch.isfinite(delta).all():
        mean = float(delta.mean())
        return Interval(mean, mean, mean, n, len(delta))
    binary = after.binary and before.binary
    finite = bool(torch.isfinite(after.values).all())
    if not delta.any() and not (binary and share):
        return Interval(0.0, 0.0, 0.0, n, len(delta))
    if not (share and finite and _within_unit(after) and _within_unit(before)):
        return _mean(_Sample.of(Items(after.groups, delta)), False, seed, bounded=False)
    a, b = _Sample.of(after), _Sample.of(before)
    mine, theirs = _mean(a, after.binary, seed, True), _mean(b, before.binary, seed, True)
    low, high = _mover(mine, theirs, a.correlation(b))
    mean = mine.mean - theirs.mean
    return Interval(mean, max(-1.0, min(mean, low)), min(1.0, max(mean, high)), n, len(delta))


def ratio(after: Items, before: Items, seed: int = 0) -> Interval | None:
    """Mean of `after` over the mean of `before`, paired; None without items or where the divisor can be 0."""
    _check_paired(after, before)
    if len(after.values) == 0 or not torch.isfinite(torch.cat([after.values, before.values])).all():
        return None
    top, bottom = _Sample.of(after), _Sample.of(before)
    weights = _weights(len(top.counts), seed)
    further = _further(len(weights), UNSEEN, seed)
    divisors = weights @ bottom.sums
    if bottom.sums.sum() <= 0 or (divisors <= 0).any():
        return None
    # One more fact, of the mean size of the divisor: all of it is lost, or all of it is kept.
    size, lost, kept = bottom.sums.mean(), min(0.0, top.sums.min()), max(bottom.sums.mean(), top.sums.max())
    ends = [(weights @ top.sums + further * end) / (divisors + further * size) for end in (lost, kept)]
    mean = float(top.sums.sum() / bottom.sums.sum())
    low, high = _lower(ends[0]), _upper(ends[1])
    return Interval(mean, min(mean, low), max(mean, high), len(top.counts), len(after.values))


def gain(edit: Items, controls: Sequence[Items], seed: int = 0, share: bool = True) -> Interval | None:
    """Mean of edit - (mean over the controls), paired by item, with its 95 % interval; None without controls.

    The edit's place counts as one draw among the controls': how much they differ widens the interval, by Student's t
    for their number. One control cannot show that, and its interval is over facts alone.

    Args:
        edit: Values of the edit.
        controls: Values of each control, for the same items.
        seed: Seed of the resampling.
        share: As in `mean_interval`.
    """
    from scipy.stats import t

    if not controls or len(edit.values) == 0:
        return None
    for control in controls:
        _check_paired(edit, control)
    together = Items(edit.groups, torch.stack([control.values.double() for control in controls]).mean(0))
    found = difference(edit, together, seed, share)
    if found is None or len(controls) < 2 or not math.isfinite(found.mean):
        return found
    m = len(controls)
    spread = float(np.std([_Sample.of(control).mean for control in controls], ddof=1))
    place = float(t.ppf((1 + LEVEL) / 2, m - 1)) * spread * math.sqrt(1 + 1 / m)
    low = found.mean - math.hypot(found.mean - found.low, place)
    high = found.mean + math.hypot(found.high - found.mean, place)
    return Interval(found.mean, low, high, found.n, found.n_items)


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


@dataclass(frozen=True)
class _Sample:
    """Items by group, groups in order of first appearance."""

    sums: Array
    counts: Array

    @classmethod
    def of(cls, items: Items) -> _Sample:
        index = {group: i for i, group in enumerate(dict.fromkeys(items.groups))}
        owner = np.array([index[group] for group in items.groups])
        values = items.values.double().numpy()
        return cls(
            np.bincount(owner, weights=values).astype(np.float64), np.bincount(owner).astype(np.float64)
        )

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    def correlation(self, other: _Sample) -> float:
        """Of the two means over groups; drawn towards 0 where there are few."""
        mine = self.sums - self.mean * self.counts
        theirs = other.sums - other.mean * other.counts
        size = math.sqrt(float(mine @ mine) * float(theirs @ theirs))
        n = len(self.counts)
        return float(mine @ theirs) / size * n / (n + PRIOR_PAIRS) if size > 1e-12 else 0.0


def _mean(sample: _Sample, binary: bool, seed: int, bounded: bool) -> Interval:
    """The mean of groups and its interval."""
    n, n_items, mean = len(sample.sums), int(sample.counts.sum()), sample.mean
    if bounded and binary and (n == n_items or mean in (0.0, 1.0)):
        return Interval(mean, *wilson(mean * n, n), n, n_items)
    means = sample.sums / sample.counts
    least, most = float(means.min()), float(means.max())
    if bounded:
        weight, bottom, top = UNSEEN, 0.0, 1.0
    else:
        weight = 1.0
        reach = BEYOND * max(most - least, abs(mean) / n)
        bottom, top = least - reach, most + reach
        bottom = max(0.0, bottom) if least >= 0 else bottom
        top = min(0.0, top) if most <= 0 else top
    weights = _weights(n, seed)
    further = _further(len(weights), weight, seed)
    size = sample.counts.mean()
    sums, counts = weights @ sample.sums, weights @ sample.counts + further * size
    low = _lower((sums + further * size * bottom) / counts)
    high = _upper((sums + further * size * top) / counts)
    return Interval(mean, min(mean, low), max(mean, high), n, n_items)


def _mover(a: Interval, b: Interval, correlation: float) -> tuple[float, float]:
    """Limits of a - b from the limits of each (Zou & Donner 2008)."""
    down, up = (a.mean - a.low, b.high - b.mean), (a.high - a.mean, b.mean - b.low)
    low, high = (math.sqrt(max(0.0, x * x - 2 * correlation * x * y + y * y)) for x, y in (down, up))
    return a.mean - b.mean - low, a.mean - b.mean + high


def _within_unit(items: Items) -> bool:
    return bool(((items.values >= 0) & (items.values <= 1)).all())


@functools.lru_cache(maxsize=8)
def _weights(n: int, seed: int) -> Array:
    """Weight of each of n groups in each resample, before they are divided by their sum."""
    size = max(500, min(RESAMPLES, 20_000_000 // n))
    drawn = np.random.default_rng(seed).standard_exponential((size, n))
    drawn.flags.writeable = False
    return drawn


@functools.lru_cache(maxsize=8)
def _further(size: int, weight: float, seed: int) -> Array:
    """Weight of the fact that was not drawn, in each resample."""
    drawn = np.random.default_rng((seed, 1)).standard_gamma(weight, size)
    drawn.flags.writeable = False
    return drawn


def _lower(means: Array) -> float:
    return float(np.quantile(means, (1 - LEVEL) / 2))


def _upper(means: Array) -> float:
    return float(np.quantile(means, (1 + LEVEL) / 2))


def _check_paired(a: Items, b: Items) -> None:
    if a.groups != b.groups:
        raise ValueError("paired comparison of different items")
