"""`locus edit --account`: the memory an edit will take, before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editors.memory_estimate import Account
    from locus.cli.options import Running, Talking
    from locus.fact import Fact
    from locus.mask import WeightMask
    from locus.model import Model

_WHAT = {
    "weights": "weights, frozen",
    "deltas": "deltas, and the copy that held last",
    "gradients": "gradients of the deltas",
    "optimizer": "optimizer state",
    "activations": "activations kept for the backward pass",
    "transient": "logits, losses and gradients at the worst moment",
    "peak": "peak on the device",
    "references": "kept states of the base, in the host's memory",
}


def say_account(
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
    """End `locus edit --account`.

    Raises:
        InputError: no mask, or a method that trains nothing.
    """
    from locus.cli.edit.edit_data import material
    from locus.errors import InputError

    if mask is None:
        raise InputError("locus edit --account needs --mask: how much is located decides what an edit takes")
    if not hasattr(editor, "training"):
        raise InputError(
            f"locus edit --account: {method} trains nothing; an account is given of trained edits"
        )
    forget, kept, (neutral, _) = material(shape, running.facts(facts), retain, text, None, running.seed)
    found = accounts(shape, mask, editor, forget, kept, neutral)
    result = {name: account.to_json() for name, account in found.items()}
    talking.finish(result, account_table(found, shape, mask))


def accounts(
    model: Model,
    mask: WeightMask,
    editor: Any,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    text: Sequence[str],
) -> dict[str, Account]:
    """The account with activations kept, and with activations computed again."""
    from editors.memory_estimate import Account, Loads

    found = {}
    loads = Loads.of(model, editor, forget, retain, text)
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        training = dataclasses.replace(editor.training, checkpointing=checkpointing)
        found[name] = Account.of(model, mask, dataclasses.replace(editor, training=training), loads)
    return found


def account_table(found: Mapping[str, Account], model: Model, mask: WeightMask) -> Any:
    """One row a kind of memory, one column a way."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("MB")
    table.add_column("as it is", justify="right")
    table.add_column("--checkpointing", justify="right")
    for name, what in _WHAT.items():
        n_bytes = [found[way].to_json()[name] for way in ("kept", "recomputed")]
        table.add_row(what, *(f"{n / 1e6:,.1f}" for n in n_bytes), style="bold" if name == "peak" else None)
    dtype = str(model.module.dtype).removeprefix("torch.")
    table.caption = f"{model.name} in {dtype}, {mask.n_weights:,} weights located; nothing was run"
    table.caption_justify = "left"
    return table
