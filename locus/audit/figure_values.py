"""What an attack or a suite measured of one state: values by the key of their figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from locus.audit.intervals import Items


@dataclass(frozen=True)
class Curve:
    """One figure along an axis."""

    over: Literal["layer", "step", "strength"]
    xs: tuple[float, ...]
    at: tuple[Items, ...]
    """The values at each x."""

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.at):
            raise ValueError(f"{len(self.xs)} places on the axis for {len(self.at)} sets of values")


@dataclass(frozen=True)
class FigureValues:
    """Values by the key of their figure; what could not be measured is absent."""

    items: Mapping[str, Items] = field(default_factory=dict)
    """One value a fact or question."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """One number for the whole set (a p-value, a harmonic mean)."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By the curve's own name."""

    def __or__(self, other: FigureValues) -> FigureValues:
        return FigureValues(
            {**self.items, **other.items},
            {**self.scalars, **other.scalars},
            {**self.curves, **other.curves},
        )
