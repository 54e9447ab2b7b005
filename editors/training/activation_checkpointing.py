"""Activation checkpointing: keep each block's input, recompute the rest of the block in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.checkpoint import checkpoint

from locus.model import Model


@contextlib.contextmanager
def activation_checkpointing(model: Model, enabled: bool = True) -> Iterator[None]:
    """Checkpoint every block inside the context (Chen et al. 2016, arXiv:1604.06174).

    transformers' own switch needs training mode, which also enables dropout; this one does not.
    """
    if not enabled:
        yield
        return
    with contextlib.ExitStack() as stack:
        for path in model.atlas.blocks:
            stack.enter_context(_checkpointed(model.module.get_submodule(path)))
        yield


@contextlib.contextmanager
def _checkpointed(block: Any) -> Iterator[None]:
    own, plain = block.__dict__.get("forward"), block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own
