"""The Pareto front by hand, and the picture."""

from __future__ import annotations

from locus.report.pareto_plot import SweepPoint, front_table, pareto_points, plot_front


def point(forget: float, utility: float, control: int | None = None) -> SweepPoint:
    return SweepPoint("1%", control, 1.0, forget, 0.0, utility, 0.01)


def test_pareto_by_hand() -> None:
    """(0.1, 0.9) and (0.0, 0.5) stay; (0.2, 0.8) is beaten by the first; (0.1, 0.9) twice counts once."""
    a, b, c, d = point(0.1, 0.9), point(0.2, 0.8), point(0.0, 0.5), point(0.1, 0.9)
    assert pareto_points([b, c, a, d]) == [a, c]
    assert pareto_points([]) == []


def test_picture_and_table(tmp_path) -> None:
    points = [point(0.1, 0.9), point(0.0, 0.5), point(0.3, 0.7, control=0)]
    assert plot_front(points, tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert front_table(points).row_count == 3
