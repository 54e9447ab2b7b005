"""`locus export`: the edited checkpoint, as a folder that any tool loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from locus.cli.options import Talking


def export(
    model: str,
    /,
    *,
    delta: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    link: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    talking: Talking = Talking(),
) -> None:
    """Write the edited checkpoint: only the shards that hold a changed tensor are rewritten.

    Args:
        model: The base: the checkpoint folder, hub id or smollm2 that the delta was made from.
        delta: The delta.safetensors of `locus edit`.
        out: Folder to write; it must not exist yet. It appears under this name only when it is complete.
        link: Hard-link the untouched shards instead of copying them.
        resume: Accept a folder that already holds this very export.
    """
    from locus.checkpoint import export as write
    from locus.delta import WeightDelta
    from locus.model import checkpoint_folder

    change = WeightDelta.load(delta)
    with talking.progress():
        done = write(checkpoint_folder(model), change, out, link=link, resume=resume)
    talking.finish(done.to_json(), f"{out}: {done.summary}")
