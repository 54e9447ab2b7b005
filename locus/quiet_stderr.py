"""Libraries in Rust tell of a panic on the terminal by themselves, before Python hears of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Hold back what is written to the terminal inside; let it out afterwards if nothing was raised.

    What was raised says the same in one line.
    """
    try:
        terminal = os.dup(_STDERR)
    except OSError:  # closed: nobody listens
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(terminal, _STDERR)
            os.close(terminal)
        held.seek(0)
        os.write(_STDERR, held.read())
