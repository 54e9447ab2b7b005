"""Line charts and heat maps as numbers that a template draws in SVG.

Colours are CSS classes, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 440, 262
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40


@dataclass(frozen=True)
class Series:
    """One line: a value at each x, with a band where it has one."""

    name: str
    xs: Sequence[float | int]
    ys: Sequence[float | None]
    css: str
    """Class that gives the colour."""
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    dashed: bool = False
    hover: Sequence[str] = ()
    """What the pointer reads at each x; made of the numbers where it is empty."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class ChartPoint:
    """A dot of a line."""

    x: float
    y: float
    hover: str


@dataclass(frozen=True)
class Line:
    """A series in pixels."""

    name: str
    css: str
    dashed: bool
    path: str
    band: str
    """SVG path of the band; empty for none."""
    points: Sequence[ChartPoint]


@dataclass(frozen=True)
class Chart:
    """A line chart, laid out when it is asked for its parts."""

    title: str
    caption: str
    """Definition, n and what the band is: shown under the chart."""
    x_label: str
    y_label: str
    series: Sequence[Series]
    percent: bool = True
    y_max: float | None = None
    y_min: float = 0.0
    integer_x: bool = True
    x_range: tuple[float, float] | None = None
    """Ends of the x axis; None takes them from the series."""
    lines: Sequence[Line] = field(init=False)
    x_ticks: Sequence[Tick] = field(init=False)
    y_ticks: Sequence[Tick] = field(init=False)
    zero: float = field(init=False)
    """Pixel height of y = 0."""

    def __post_init__(self) -> None:
        xs = [x for s in self.series for x in s.xs] or [0.0, 1.0]
        values = [y for s in self.series for y in (*s.ys, *s.high, *s.low) if y is not None]
        top = self.y_max if self.y_max is not None else max([*values, 1e-9]) * 1.05
        bottom = min(self.y_min, min(values, default=0.0))
        x0, x1 = self.x_range or (min(xs), max(max(xs), min(xs) + 1e-9))
        y_steps = ticks(bottom, top)
        bottom, top = min(bottom, y_steps[0]), max(top, y_steps[-1] if self.y_max is None else top)

        def px(x: float | int) -> float:
            return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

        def py(y: float | int) -> float:
            return round(TOP + (top - y) / (top - bottom) * (HEIGHT - TOP - BOTTOM), 1)

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("lines", [self._line(s, px, py) for s in self.series])
        put("x_ticks", [Tick(px(x), f"{x:g}") for x in ticks(x0, x1, whole=self.integer_x) if x0 <= x <= x1])
        put("y_ticks", [Tick(py(y), self._label(y, y_steps)) for y in y_steps if bottom <= y <= top])
        put("zero", py(max(bottom, 0.0)))

    def _label(self, y: float, steps: Sequence[float]) -> str:
        if not self.percent:
            return f"{y:g}"
        decimals = 0 if len(steps) < 2 or steps[1] - steps[0] >= 0.0099 else 1
        return f"{100 * y:.{decimals}f} %"

    def _line(self, s: Series, px: object, py: object) -> Line:
        assert callable(px) and callable(py)
        points = []
        for i, (x, y) in enumerate(zip(s.xs, s.ys, strict=True)):
            if y is None:
                continue
            shown = f"{100 * y:.1f} %" if self.percent else f"{y:.3g}"
            text = s.hover[i] if s.hover else f"{s.name}, {self.x_label} {x:g}: {shown}"
            points.append(ChartPoint(px(x), py(y), text))
        path = "M" + "L".join(f"{p.x},{p.y}" for p in points) if points else ""
        band = ""
        if s.low and s.high and None not in (*s.low, *s.high):
            there = [f"{px(x)},{py(y)}" for x, y in zip(s.xs, s.high, strict=True)]
            back = [f"{px(x)},{py(y)}" for x, y in zip(s.xs, s.low, strict=True)]
            band = "M" + "L".join([*there, *reversed(back)]) + "Z"
        return Line(s.name, s.css, s.dashed, path, band, points)


def ticks(low: float | int, high: float | int, whole: bool = False) -> list[float]:
    """About five round numbers that span low to high."""
    span = max(high - low, 1e-9)
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    step = max(1.0, float(round(step))) if whole else step
    first = math.floor(low / step + 1e-9)
    out: list[float] = []
    while not out or out[-1] < high - 1e-9 * span:
        out.append(float(round((first + len(out)) * step, 12)))
    return out


@dataclass(frozen=True)
class HeatSquare:
    """One square of a heat map."""

    x: float
    y: float
    shade: float
    """0 nothing, 1 the strongest."""
    hover: str


@dataclass(frozen=True)
class HeatMap:
    """Tokens on y, layers on x, the darker the more a state gives back."""

    title: str
    css: str
    labels: Sequence[str]
    """One a row; those of the subject end in *."""
    marked: Sequence[bool]
    """Rows of the subject."""
    values: Sequence[Sequence[float]]
    """[row][column]: the effect."""
    low: str
    high: str
    """Ends of the colour scale, in words."""
    quantity: str
    """What a value is called when the pointer is on it."""
    strongest: float | None = None
    """Value of the full colour, so that two maps can share a scale; None for the map's own largest."""
    hover: Sequence[Sequence[str]] = ()
    """[row][column]: what the pointer reads; made of the values where it is empty."""
    cells: Sequence[HeatSquare] = field(init=False)
    width: float = field(init=False)
    height: float = field(init=False)
    x_ticks: Sequence[Tick] = field(init=False)
    left: float = field(init=False)
    cell_width: float = field(init=False)

    row_height = 16

    def __post_init__(self) -> None:
        n_columns = max((len(row) for row in self.values), default=0)
        left = 8 + 6.6 * max((len(label) for label in self.labels), default=0)
        cell_width = max(4.0, min(18.0, 300 / max(1, n_columns)))
        strongest = self.strongest or max((v for row in self.values for v in row), default=0.0)
        cells = []
        for y, (label, row) in enumerate(zip(self.labels, self.values, strict=True)):
            for x, value in enumerate(row):
                if value == 0 or strongest <= 0:
                    continue
                shade = round(max(0.0, value / strongest), 2)
                text = f"{label.rstrip('*')} · layer {x}: {self.quantity} {value:+.4f}"
                text = self.hover[y][x] if self.hover else text
                cells.append(
                    HeatSquare(round(left + x * cell_width, 2), float(y * self.row_height), shade, text)
                )

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("cells", cells)
        put("left", left)
        put("cell_width", cell_width)
        put("width", left + n_columns * cell_width + 6)
        put("height", float(len(self.labels) * self.row_height + 34))
        marks = [x for x in ticks(0, max(1, n_columns - 1), whole=True) if x <= n_columns - 1]
        put("x_ticks", [Tick(left + (x + 0.5) * cell_width, f"{x:g}") for x in marks])
