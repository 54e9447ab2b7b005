"""The mask contract, proven: nothing in the module differs by a bit from what it was before the edit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MaskLeak(RuntimeError):  # noqa: N818  (the name of what happened)
    """A weight outside the mask moved. A defect of an editor, never of the input."""


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).cpu().numpy().data).hexdigest()


def digests(module: nn.Module) -> dict[str, str]:
    """sha256 of every parameter and buffer that is in memory, by name; tied tensors once."""
    found = [*module.named_parameters(), *module.named_buffers()]
    return {name: digest(tensor) for name, tensor in found if not tensor.is_meta}


@contextlib.contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Check on leaving that every tensor of the module is bit for bit what it was on entering.

    Raises:
        MaskLeak: naming the tensors that moved, appeared or went.
    """
    before = digests(module)
    yield
    after = digests(module)
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        raise MaskLeak(f"the edit moved weights of the base it must not touch: {', '.join(moved[:3])}{more}")
