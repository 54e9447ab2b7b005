"""What a localizer will spend, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable


@dataclass(frozen=True)
class Cost:
    """Work in passes of one example through the whole model.

    A pass that touches only a part of the model, or a part of the positions, counts for that part: half of
    the layers is half a forward, one position of a prompt of 48 is a forty-eighth.
    """

    forwards: float | int = 0
    """Forward passes of one example."""
    backwards: float | int = 0
    """Backward passes of one example; each is worth about one to two forwards."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forwards + other.forwards, self.backwards + other.backwards)

    def __mul__(self, times: float | int) -> Cost:
        return Cost(self.forwards * times, self.backwards * times)

    def __str__(self) -> str:
        return f"{self.forwards:,.4g} forwards and {self.backwards:,.4g} backwards of one example"


@runtime_checkable
class PublishedThreshold(Protocol):
    """A localizer whose paper keeps the neurons above a threshold."""

    PAPER_THRESHOLD: ClassVar[float]
    """That threshold, as a share of the highest score or as the paper scales it."""
