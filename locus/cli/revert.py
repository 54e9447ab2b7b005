"""`locus revert`: the base again, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from locus.cli.options import Talking


def revert(
    checkpoint: Path,
    /,
    *,
    delta: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    link: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    talking: Talking = Talking(),
) -> None:
    """Take a delta out of a checkpoint again, bit for bit.

    Args:
        checkpoint: A folder that holds the delta's change (what `locus export` wrote).
        delta: The delta to take out.
        out: Folder to write; it must not exist yet.
        link: Hard-link the untouched shards instead of copying them.
        resume: Accept a folder that already holds this very result.
    """
    from locus.checkpoint_export import revert as write
    from locus.delta import WeightDelta
    from locus.model import checkpoint_folder

    change = WeightDelta.load(delta)
    with talking.progress():
        done = write(checkpoint_folder(str(checkpoint)), change, out, link=link, resume=resume)
    talking.finish(done.to_json(), f"{out}: {done.summary}")
