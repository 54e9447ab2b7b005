"""The mask contract, checked: every tensor of the module has the same bits as before the edit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from locus.fingerprint import digests, tensor_digest
from locus.parallel.sharding import is_sharded, reshard, to_local


class MaskLeak(RuntimeError):
    """A weight outside the mask moved. A defect of an editor, never of the input."""


def every_digest(module: nn.Module) -> dict[str, str]:
    """sha256 of every parameter and buffer that is in memory, by name; tied tensors once.

    Of a sharded model, of this process's part of each.
    """
    if is_sharded(module):
        reshard(module)
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    names = [name for name, tensor in found.items() if not tensor.is_meta]
    return digests(names, lambda name: tensor_digest(to_local(found[name])))


@contextlib.contextmanager
def weights_unchanged(module: nn.Module) -> Iterator[dict[str, str]]:
    """Check on leaving that every tensor of the module is bit for bit what it was on entering; gives their digests.

    Raises:
        MaskLeak: naming the tensors that moved, appeared or went.
    """
    before = every_digest(module)
    yield before
    after = every_digest(module)
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        raise MaskLeak(f"the edit moved weights of the base it must not touch: {', '.join(moved[:3])}{more}")
