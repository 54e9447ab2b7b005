"""What holds after every test: nothing of ours stays behind in a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import tiny


@pytest.fixture(autouse=True)
def no_hook_survives() -> Iterator[None]:
    """After each test, no tiny model that still lives carries a hook."""
    yield
    for model in list(tiny.alive):
        for name, module in model.named_modules():
            left = [
                *module._forward_hooks.values(),
                *module._forward_pre_hooks.values(),
                *module._backward_hooks.values(),
            ]
            assert not left, f"{type(model).__name__}.{name} still has hooks: {left}"
