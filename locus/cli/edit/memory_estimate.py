"""`locus edit --estimate-memory`: peak memory of an edit, from config, mask and facts; no weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.editor import EditData
    from editors.memory_estimate import MemoryEstimate
    from locus.cli.options import Running, Talking
    from locus.mask import WeightMask
    from locus.model import Model

_WHAT = {
    "weights": "weights, frozen",
    "deltas": "deltas, and the copy of the last good check",
    "gradients": "gradients of the deltas",
    "optimizer": "optimizer state",
    "activations": "activations kept for the backward pass",
    "transient": "logits, losses and gradients at the peak",
    "peak": "peak on the device",
    "references": "stored states of the base, in host memory",
}


def print_estimate(
    shape: Model,
    method: str,
    editor: Any,
    mask: WeightMask | None,
    running: Running,
    facts: str,
    retain: str | None,
    text: Path | None,
    talking: Talking,
) -> None:
    """Print the estimate.

    Raises:
        InputError: no mask, or a method that trains nothing.
    """
    from editors.editor import EditData
    from editors.training.objective import Trains
    from locus.cli.edit.edit_data import material
    from locus.errors import InputError

    if mask is None:
        raise InputError(
            "locus edit --estimate-memory needs --mask: the memory depends on how many weights are located"
        )
    if not isinstance(editor, Trains):
        raise InputError(
            f"locus edit --estimate-memory: {method} trains nothing; only trained edits have an estimate"
        )
    forget, kept, (neutral, _) = material(shape, running.facts(facts), retain, text, None, running.seed)
    found = estimates(shape, mask, editor, EditData(forget, kept, neutral))
    result = {name: estimate.to_json() for name, estimate in found.items()}
    talking.finish(result, estimate_table(found, shape, mask))


def estimates(model: Model, mask: WeightMask, editor: Any, data: EditData) -> dict[str, MemoryEstimate]:
    """The estimate with activations kept, and with activations recomputed.

    Args:
        model: The base, or its shape.
        mask: The weights that may move.
        editor: A trained editor.
        data: Facts to forget, facts to keep, neutral text.
    """
    from editors.memory_estimate import LargestForwards, MemoryEstimate

    found = {}
    loads = LargestForwards.of(model, editor, data)
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        training = dataclasses.replace(editor.training, checkpointing=checkpointing)
        found[name] = MemoryEstimate.of(model, mask, dataclasses.replace(editor, training=training), loads)
    return found


def estimate_table(found: Mapping[str, MemoryEstimate], model: Model, mask: WeightMask) -> Any:
    """One row per kind of memory; one column with activations kept, one with checkpointing."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("MB")
    table.add_column("default", justify="right")
    table.add_column("--checkpointing", justify="right")
    for name, what in _WHAT.items():
        n_bytes = [found[way].to_json()[name] for way in ("kept", "recomputed")]
        table.add_row(what, *(f"{n / 1e6:,.1f}" for n in n_bytes), style="bold" if name == "peak" else None)
    dtype = str(model.module.dtype).removeprefix("torch.")
    table.caption = f"{model.name} in {dtype}, {mask.n_weights:,} weights located; nothing was run"
    table.caption_justify = "left"
    return table
