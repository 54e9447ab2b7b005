"""Which example, and which layer, a NaN or infinity comes from first."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from locus.errors import InputError
from locus.finite_checks import is_finite
from locus.hooks import record
from locus.model import Model
from locus.tokens import Encoded

_MEND = "damaged weights, or a dtype too small (try --dtype float32)"


def blame(model: Model, examples: Iterable[tuple[str, Encoded]], what: str) -> InputError:
    """The error for something computed of these examples that came out as NaN or infinity.

    They are run once more, one by one, to find the first example and the first block at fault. Where all blocks give
    numbers, only what was computed behind them is named.

    Args:
        model: As it was when it happened.
        examples: Names and tokens, in their order; with one of them alone that one is named in any case.
        what: What came out as no number, with its article.
    """
    listed = list(examples)
    if (found := first_at_fault(model, listed)) is not None:
        return InputError(f"fact {found[0]!r}: {found[1]} of {model.name} gives NaN or infinity: {_MEND}")
    names = ", ".join(repr(name) for name, _ in listed[:3]) + (", …" if len(listed) > 3 else "")
    facts = "fact" if len(listed) == 1 else "facts"
    return InputError(
        f"{facts} {names}: {what} comes out as NaN or infinity, though every layer of {model.name} gives numbers: "
        "gradients too large for the dtype (try --dtype float32)"
    )


def first_at_fault(model: Model, examples: Iterable[tuple[str, Encoded]]) -> tuple[str, str] | None:
    """The first example whose run is not finite, and the first part of the model at fault in it, in words."""
    for name, encoded in examples:
        if (part := first_broken(model, encoded.ids)) is not None:
            return name, part
    return None


@torch.no_grad()
def first_broken(model: Model, ids: Iterable[int]) -> str | None:
    """The first part of the model whose output on these tokens is not finite, in words; None where all are."""
    blocks = model.atlas.blocks
    tokens = torch.tensor([list(ids)], device=model.device)
    with record(model.module, outputs=[model.atlas.embed, *blocks]) as seen:
        logits = model.module(input_ids=tokens, use_cache=False).logits
    if not is_finite(seen.outputs[model.atlas.embed]):
        return "the embedding"
    for layer, block in enumerate(blocks):
        if not is_finite(seen.outputs[block]):
            return f"layer {layer}"
    return None if is_finite(logits) else "the unembedding"
