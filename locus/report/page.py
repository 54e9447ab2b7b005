"""Pages: one file, no network, every text from outside escaped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from locus.files.artefact import atomic_file

if TYPE_CHECKING:
    from jinja2 import Environment


def write_page(path: str | Path, template: str, **values: Any) -> Path:
    """Render a template of `locus/report/templates` into a file, atomically; returns its path."""
    from jinja2 import UndefinedError

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = _environment().get_template(template).render(**values)
    except UndefinedError as error:
        raise LookupError(f"the page needs what it was not given: {error}") from error
    with atomic_file(path) as temp:
        temp.write_text(text, encoding="utf-8")
    return path


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("locus.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def percent(value: float | None) -> str:
    """A share as a reader wants it: more digits near zero and near one."""
    if value is None:
        return "not finite"
    if value in (0.0, 1.0) or 0.0995 <= abs(value) < 0.9995:
        return f"{100 * value:.0f} %"
    if abs(value) < 0.0005:
        return "< 0.1 %" if value > 0 else "> −0.1 %"
    return f"{100 * value:.1f} %".replace("-", "−")


def span(low: str, high: str) -> str:
    """Two ends of an interval, their common unit written once."""
    for unit in (" %", " pts"):
        if low.endswith(unit) and high.endswith(unit):
            low = low.removesuffix(unit)
    return low if low == high else f"{low} to {high}"


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "not finite"
    if 1000 <= abs(value) < 1e7:
        return count(round(value))
    return f"{value:.3g}".replace("-", "−")


def count(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f")
