"""Activation checkpointing: keep each block's input, recompute the rest of the block in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from torch.utils.checkpoint import checkpoint

from locus.hooks import replaced_forward
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
            block = model.module.get_submodule(path)
            forward = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(replaced_forward(block, forward))
        yield
