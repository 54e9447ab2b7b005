"""How many bytes of tensors are alive, operator by operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the context, counts the storages that operators make, until they die.

    Memory that a kernel allocates and frees internally is not counted. Tensors made before the context are counted once
    passed to `count`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Maximum of bytes alive since the beginning, or since `reset_peak`."""
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that are not counted yet, each storage once; returns the bytes added."""
        before = self.now
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += self._sizes[key]
                weakref.finalize(storage, self._gone, key).atexit = False
        added = self.now - before
        self.peak = max(self.peak, self.now)
        return added

    def reset_peak(self) -> None:
        """Restart the peak at the bytes alive now."""
        self.peak = self.now

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
