"""Many items, each computed on its own and then summed: shared among the processes of a job.

Who is ready takes the next item, and every result comes back to all processes in the order of the items. What is
then added up is added in that order, whoever computed it, so that the sum is one process's to the bit.

Work is shared only inside `together`, which a command enters when torchrun has started several processes; a function
that goes through its items by `each` need not know.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from locus.errors import InputError
from locus.finite_checks import is_finite
from locus.parallel.ranks import ALONE, Ranks
from locus.parallel.serialize import packed, unpacked
from locus.progress import track

T = TypeVar("T")
V = TypeVar("V")
ItemTensors = tuple[Tensor, ...]
"""What is computed of one item."""

_HELD = 256
"""Items whose results are held before they are broadcast."""

_job: ContextVar[Ranks] = ContextVar("locus_job", default=ALONE)


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Share the work of every `each` inside among these processes, which all do the same things."""
    token = _job.set(ranks)
    try:
        yield
    finally:
        _job.reset(token)


def each(
    items: Sequence[T],
    work: Callable[[T], ItemTensors],
    description: str,
    blame: Callable[[T], InputError] | None = None,
) -> Iterator[ItemTensors]:
    """What `work` makes of each item, in the order of the items.

    Args:
        items: The same on all processes.
        work: Depends on nothing but the item; inside it nothing is shared any further.
        description: For the line of progress.
        blame: The error for an item whose numbers are not finite; None takes them as they are.

    Raises:
        InputError: as `blame` says.
        Stopped: another process was lost.
    """

    def checked(item: T) -> ItemTensors:
        found = work(item)
        if blame is not None and not is_finite(*found):
            raise blame(item)
        return found

    ranks = _job.get()
    if ranks.size == 1:
        for item in track(items, description):
            yield checked(item)
        return
    for start in range(0, len(items), _HELD):
        held: dict[int, ItemTensors] = {}
        numbers = range(start, min(start + _HELD, len(items)))
        with together(ALONE):
            for number in ranks.share(numbers, description):
                held[number] = tuple(tensor.detach().cpu().contiguous() for tensor in checked(items[number]))
        yield from _broadcast_results(ranks, held, numbers)


def each_value(items: Sequence[T], work: Callable[[T], V], form: type[V], description: str) -> Iterator[V]:
    """As `each`, for work that makes instances of a dataclass."""
    if _job.get().size == 1:
        yield from map(work, track(items, description))
        return
    for piece in each(items, lambda item: packed(work(item)), description):
        yield unpacked(piece, form)


def n_processes() -> int:
    """How many share the work."""
    return _job.get().size


def own_part(items: Sequence[T]) -> Sequence[T]:
    """The items that fall to this process where results are too large to be broadcast: every so many-th.

    What they come to is summed by `add_`: equal to one process's within rounding, and the same at every run.
    """
    ranks = _job.get()
    return items[ranks.rank :: ranks.size]


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    _job.get().all_reduce(tensors)


def _broadcast_results(
    ranks: Ranks, held: dict[int, ItemTensors], numbers: Sequence[int]
) -> Iterator[ItemTensors]:
    """Every item's result in turn, from the process that has it."""
    own = {number: [_form(tensor) for tensor in piece] for number, piece in held.items()}
    forms: dict[int, tuple[int, list[Any]]] = {}
    for rank, said in enumerate(ranks.all_gather(json.dumps(own))):
        forms |= {int(number): (rank, form) for number, form in json.loads(said).items()}
    for number in numbers:
        rank, form = forms[number]
        piece = held.pop(number) if rank == ranks.rank else tuple(_blank(*one) for one in form)
        for tensor in piece:
            ranks.broadcast(tensor, rank)
        yield piece


def _form(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _blank(dtype: str, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
