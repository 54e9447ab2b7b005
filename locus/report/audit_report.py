"""The audit's page and its table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locus.audit import Audit
from locus.audit.compare import compare, merge
from locus.report.audit_charts import MAX_FACTS, charts, front_chart, heat_maps
from locus.report.audit_view import columns, fact_rows, matrix, state_css, table, verdict_rows
from locus.report.page import count, number, percent, write_page

if TYPE_CHECKING:
    from rich.table import Table


def audit_report(audit: Audit | Mapping[str, Any], folder: str | Path) -> Path:
    """Write one self-contained report.html into a folder; returns its path.

    Args:
        audit: An audit, or the document that `locus.audit.read_audit` gives.
        folder: Made if it is not there.
    """
    return _write(_document(audit), Path(folder) / "report.html")


def compare_report(audits: Mapping[str, Mapping[str, Any]], folder: str | Path) -> Path:
    """Write one self-contained compare.html with the edits of several audits side by side; returns its path.

    Args:
        audits: Name -> document, as `locus.audit.read_audit` gives it.
        folder: Made if it is not there.

    Raises:
        InputError: no audits, or audits of different base models or forget sets.
    """
    return _write(merge(audits), Path(folder) / "compare.html")


def _write(doc: Mapping[str, Any], path: Path) -> Path:
    edits = [s["name"] for s in doc["states"] if s["role"] == "edit"]
    n_controls = sum(s["role"] == "control" for s in doc["states"])
    side = compare({"audit": doc}) if len(edits) > 1 else None
    css = state_css(doc)
    return write_page(
        path,
        "audit.html.j2",
        doc=doc,
        edits=edits,
        css=css,
        n_controls=n_controls,
        has_controls=any(c["against"] == "controls" for c in doc["comparisons"]),
        side=side,
        front=None if side is None else front_chart(side, css),
        unequal=_unequal(doc),
        verdicts={edit: verdict_rows(doc["verdicts"][edit]) for edit in edits},
        sections=table(doc),
        columns=columns(doc),
        all_columns=columns(doc, everything=True),
        all_sections=table(doc, everything=True),
        matrix=matrix(doc),
        charts=charts(doc, css),
        maps=heat_maps(doc, css),
        n_shown=MAX_FACTS,
        forget=fact_rows(doc, "forget"),
        held_out=fact_rows(doc, "held_out"),
        retained=fact_rows(doc, "retained"),
        changes=[{"name": s["name"], "role": s["role"], **s["change"]} for s in doc["states"] if s["change"]],
        settings=list(_flat(doc["settings"])),
        percent=percent,
        number=number,
        count=count,
    )


def terminal_table(audit: Audit | Mapping[str, Any]) -> Table:
    """The main figures as a rich table, for people who look at a terminal."""
    from rich.markup import escape
    from rich.table import Table

    doc = _document(audit)
    edits = [s["name"] for s in doc["states"] if s["role"] == "edit"]
    out = Table(title=None, caption="\n".join(escape(f"{name}: {doc['headline'][name]}") for name in edits))
    out.caption_justify = "left"
    out.add_column("")
    for title, _, states in columns(doc):
        out.add_column(escape(title), justify="right", style="bold" if states[0]["role"] == "edit" else "")
    with_gain = any(c["against"] == "controls" for c in doc["comparisons"])
    for edit in edits if with_gain else []:
        out.add_column(
            escape(f"{edit} − controls" if len(edits) > 1 else "against controls"), justify="right"
        )
    colours = {"good": "green", "bad": "red", "none": "dim", "": ""}
    for section in table(doc):
        out.add_section()
        for row in section.rows:
            cells = [escape(cell.value or cell.range or "–") for cell in row.cells]
            for cell in row.gains if with_gain else []:
                style = colours.get(cell.css, "")
                cells.append(
                    f"[{style}]{escape(cell.value)}[/]" if style and cell.value else escape(cell.value)
                )
            out.add_row(escape(row.label), *cells)
    return out


def _document(audit: Audit | Mapping[str, Any]) -> Mapping[str, Any]:
    return audit.document() if isinstance(audit, Audit) else audit


def _unequal(doc: Mapping[str, Any]) -> bool:
    """Whether some edit forgot better or worse than the controls."""
    return any(
        c["key"] == "forget.prob" and c["against"] == "controls" and c["outcome"] in ("better", "worse")
        for c in doc["comparisons"]
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
