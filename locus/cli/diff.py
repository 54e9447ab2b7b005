"""`locus diff`: what differs between two checkpoints, on and off a mask."""

from __future__ import annotations

from pathlib import Path

from locus.cli.options import Talking


def diff(a: str, b: str, /, *, mask: Path | None = None, talking: Talking = Talking()) -> None:
    """Count what differs between two checkpoints, tensor by tensor, bit by bit.

    Args:
        a: A checkpoint folder, hub id or smollm2.
        b: Another one.
        mask: Count the changed entries on this mask and off it.
    """
    from rich.table import Table

    from locus.checkpoint_export import diff as compare
    from locus.mask import WeightMask
    from locus.model import checkpoint_folder

    located = None if mask is None else WeightMask.load(mask)
    with talking.progress():
        report = compare(checkpoint_folder(a), checkpoint_folder(b), located)
    table = Table(box=None, pad_edge=False)
    for name in (
        "tensor",
        "changed",
        "of",
        "largest change",
        "relative norm",
        *(("off the mask",) if mask else ()),
    ):
        table.add_column(name, justify="left" if name == "tensor" else "right", no_wrap=True)
    for row in report.tensors:
        cells = [
            row.name,
            f"{row.n_changed:,}",
            f"{row.n_entries:,}",
            f"{row.max_abs:.3g}",
            f"{row.relative_norm:.3g}",
        ]
        table.add_row(*cells, *((f"{row.n_off_mask:,}",) if mask else ()))
    table.caption = report.summary
    talking.finish(report.to_json(), table)
