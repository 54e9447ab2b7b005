"""Did the place of an edit matter: the edit's mask as one draw among the controls' masks.

What differs by chance here is the mask, not the fact: two random masks of equal size often differ on every fact. So
each mask counts as one value (its mean over the facts, which all masks share), and the edit is compared with the spread
of the controls by the test of one case against a small sample (Crawford & Howell 1998):

    t = (x - mean(c)) / (s √(1 + 1/m)),  m - 1 degrees of freedom

for m controls. Beyond that the edit must lie outside all of them: its rank among m + 1 masks, of which the smallest
two-sided p is 2 / (m + 1), assumes nothing of how masks are distributed. Values are compared on a scale on which masks
differ alike everywhere: logits of mean probabilities, the arcsine of shares of yes and no, logarithms of nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from locus.audit.intervals import Array, Items

P_SHOWN = 0.02
"""A difference is shown below this p. Stricter than 5 %, because masks are not distributed normally: at .02 less than
5 % of random masks are called better or worse even with tails as heavy as Student's t with 3 degrees of freedom."""
LEAST_SPREAD = 0.05
"""Masks that agree more closely than this (in logits or logarithms: by 5 %) count as if they differed by as much."""
_TINY = 1e-6


@dataclass(frozen=True)
class PlaceTest:
    """One figure of an edit beside that of its controls."""

    higher: bool
    """Whether the edit's value lies above the controls' mean."""
    p: float
    """Two-sided, for "the edit's mask is one more random mask"; 1 where the edit lies within the controls' range."""
    n_controls: int


def place_test(edit: Items, controls: Sequence[Items], share: bool = True) -> PlaceTest:
    """Compare one figure of an edit with that of its controls, on the same items.

    Args:
        edit: Values of the edit.
        controls: Values of each control.
        share: Whether the values are shares or probabilities; False for nats and scores.
    """
    values = [items.values.double().numpy() for items in (edit, *controls)]
    means = np.array([one.mean() for one in values])
    m, higher = len(controls), bool(means[0] > means[1:].mean())
    if m < 2 or not np.isfinite(means[1:]).all():
        return PlaceTest(higher, 1.0, m)
    if not math.isfinite(means[0]):
        return PlaceTest(True, 0.0, m)
    binary = all(items.binary for items in (edit, *controls))
    scaled, least = _scaled(means, share, binary, len(set(edit.groups)))
    mine, others = scaled[0], scaled[1:]
    if others.min() <= mine <= others.max():
        return PlaceTest(higher, 1.0, m)
    return PlaceTest(higher, _p_of_one_case(float(mine), others, least), m)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(ps, kind="stable")
    found, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = highest
    return found


def _p_of_one_case(mine: float, others: Array, least: float) -> float:
    from scipy.stats import t

    m = len(others)
    spread = max(least, float(others.std(ddof=1)))
    return float(2 * t.sf(abs(mine - float(others.mean())) / (spread * math.sqrt(1 + 1 / m)), m - 1))


def _scaled(means: Array, share: bool, binary: bool, n: int) -> tuple[Array, float]:
    """The means on the scale of the test, and the least spread there: of yes and no, that of n independent facts."""
    if share and binary:
        return np.arcsin(np.sqrt(means)), 0.5 / math.sqrt(n)
    if share and ((means >= 0) & (means <= 1)).all():
        inside = means.clip(_TINY, 1 - _TINY)
        return np.log(inside / (1 - inside)), LEAST_SPREAD
    if (means >= 0).all():
        return np.log(means.clip(_TINY)), LEAST_SPREAD
    return means, LEAST_SPREAD * float(np.abs(means[1:].mean()))
