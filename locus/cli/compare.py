"""`locus compare`: several audited edits side by side."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from locus.cli.options import Talking


def compare(
    *audits: Path, out: Annotated[Path, Parameter(name=["--out", "-o"])], talking: Talking = Talking()
) -> None:
    """Put several audited edits side by side, with the Pareto front and the one to ship.

    Args:
        audits: Folders of `locus audit` (or their audit.json), of one base and one set of facts.
        out: Folder for compare.html.
    """
    from rich.table import Table

    from locus.audit import read_audit
    from locus.audit.compare import compare as side_by_side
    from locus.files.schema import understood
    from locus.report import compare_report

    documents = {_name(path): read_audit(path) for path in audits}
    with understood(", ".join(map(str, audits)), "set of audits", "audit again"):
        side = side_by_side(documents)
        page = compare_report(documents, out)
    table = Table(box=None, pad_edge=False)
    table.add_column("edit")
    for objective in side.objectives:
        table.add_column(objective, justify="right")
    table.add_column("unbeaten", justify="right")
    for one in side.candidates:
        means = [(one.figures[key] or {}).get("mean") for key in side.objectives]
        cells = ["" if mean is None else f"{mean:.3g}" for mean in means]
        table.add_row(one.name, *cells, "yes" if one.on_front else "no")
    table.caption = "\n".join((*(f"Not asked alike: {line}." for line in side.unequal), side.why, str(page)))
    table.caption_justify = "left"
    candidates = [dataclasses.asdict(one) for one in side.candidates]
    talking.finish(
        {
            "page": str(page),
            "recommended": side.recommended,
            "why": side.why,
            "unequal": list(side.unequal),
            "candidates": candidates,
        },
        table,
    )


def _name(path: Path) -> str:
    """What an audit is called: its folder, or the folder above where that is just "audit"."""
    folder = path.parent if path.suffix == ".json" else path
    return folder.resolve().parent.name if folder.name == "audit" else folder.name
