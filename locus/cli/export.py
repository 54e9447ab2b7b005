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
    adapter: Annotated[bool, Parameter(negative="")] = False,
    link: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    talking: Talking = Talking(),
) -> None:
    """Write the edited checkpoint: only the shards that hold a changed tensor are rewritten. Or an adapter for peft.

    Args:
        model: The base: the checkpoint folder, hub id or smollm2 that the delta was made from.
        delta: The delta.safetensors of `locus edit`.
        out: Folder to write; it must not exist yet. It appears under this name only when it is complete.
        adapter: Write the edit alone, as a sparse adapter (SHiRA) that peft adds to the base: where it comes out bit
            for bit, else it is refused. Needs peft.
        link: Hard-link the untouched shards instead of copying them.
        resume: Accept a folder that already holds this very export.
    """
    from locus.checkpoint import Checkpoint
    from locus.checkpoint_export import export as write
    from locus.delta import WeightDelta
    from locus.errors import InputError
    from locus.model import checkpoint_folder

    change = WeightDelta.load(delta)
    if adapter:
        from locus.sparse_adapter import export_adapter

        if link or resume:
            raise InputError("--adapter writes two small files: leave --link and --resume out")
        with talking.progress():
            folder = checkpoint_folder(model)
            hub_id = model if "/" in model and not Path(model).exists() else ""
            r = export_adapter(Checkpoint(folder), change, out, hub_id)
        result = {"folder": str(out), "delta": change.id, "r": r, "n_tensors": len(change.changes)}
        talking.finish(result, f"{out}: sparse adapter of {len(change.changes)} tensors, r = {r}, exact")
        return
    with talking.progress():
        done = write(checkpoint_folder(model), change, out, link=link, resume=resume)
    talking.finish(done.to_json(), f"{out}: {done.summary}")
