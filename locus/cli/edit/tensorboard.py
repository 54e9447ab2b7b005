"""`--tensorboard`: the history of an edit as TensorBoard scalars, in a folder beside the delta."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


def check_board() -> None:
    """Refuse, before anything runs, when the writer is not installed.

    Raises:
        InputError: TensorBoard is missing.
    """
    from locus.errors import InputError

    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            '--tensorboard needs TensorBoard: pip install "locus-unlearn[tensorboard]"'
        ) from error


@contextlib.contextmanager
def board(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes each step's record into `folder`/tensorboard.

    A resumed run reports its earlier steps again, so what an interrupted one wrote is replaced.
    """
    from torch.utils.tensorboard import SummaryWriter

    if (folder / FOLDER).exists():
        shutil.rmtree(folder / FOLDER)
    number = itertools.count(1)
    with SummaryWriter(str(folder / FOLDER)) as writer:

        def log(record: Mapping[str, Any]) -> None:
            step = record.get("step", next(number))
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    writer.add_scalar(name, value, step)

        yield log
