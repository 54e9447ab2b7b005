"""Progress of long work on stderr: how far, how fast, how long still.

Silent unless somebody asked: the command line wraps its work in `show()`, a notebook may do the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")
_WORTH_A_LINE = 3.0
"""Seconds: what took less leaves no line behind."""

_active: ContextVar[Progress | None] = ContextVar("locus_progress", default=None)


class Task:
    """One line of progress; `advance` moves it, and does nothing when progress is not shown."""

    def __init__(self, progress: Progress | None, task_id: TaskID | None) -> None:
        self._progress, self._task_id = progress, task_id

    def advance(self, n: float | int = 1, note: str = "") -> None:
        """Move forward by `n` units; `note` (a loss, say) is shown behind the line."""
        if self._progress is not None and self._task_id is not None:
            self._progress.update(self._task_id, advance=n, note=note)


@contextlib.contextmanager
def show() -> Iterator[None]:
    """Show the progress of everything inside, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        TextColumn("{task.fields[note]}"),
    )

    class _Rated(Progress):
        def get_renderables(self) -> Iterator[object]:  # type: ignore[override]
            for task in self.tasks:
                speed = task.finished_speed or task.speed
                task.fields["rate"] = f"{speed:.2g}/s" if speed else ""
            yield self.make_tasks_table(self.tasks)

    with _Rated(*columns, console=Console(stderr=True), transient=False) as progress:
        token = _active.set(progress)
        try:
            yield
        finally:
            _active.reset(token)


@contextlib.contextmanager
def task(description: str, total: float | int | None = None) -> Iterator[Task]:
    """A line of progress for work that counts its own steps."""
    progress = _active.get()
    if progress is None:
        yield Task(None, None)
        return
    task_id = progress.add_task(description, total=total, note="", rate="")
    yield Task(progress, task_id)
    line = next(one for one in progress.tasks if one.id == task_id)
    outermost = all(other.finished or other.id == task_id for other in progress.tasks)
    if outermost and (line.elapsed or 0) > _WORTH_A_LINE:
        progress.stop_task(task_id)
    else:  # short work, or a line inside another: gone when done, so that a thousand facts leave no thousand lines
        progress.remove_task(task_id)


def track(items: Iterable[T], description: str, total: float | int | None = None) -> Iterator[T]:
    """Yield the items of `items`, moving a line of progress by one after each."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total) as line:
        for item in items:
            yield item
            line.advance()


@contextlib.contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Switch off transformers' own progress bars inside; its warnings stay."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
