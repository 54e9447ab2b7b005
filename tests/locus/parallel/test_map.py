"""Results of single items, shared: in the items' order, whoever computed them; and what is handed over, unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.parallel import map as module
from locus.parallel.map import each, together
from locus.parallel.ranks import joined
from locus.parallel.serialize import packed, unpacked
from tests.together.forked import job


@dataclass(frozen=True)
class Inner:
    values: Float[Tensor, " n"]
    name: str


@dataclass(frozen=True)
class Outer:
    by_name: dict[str, Inner]
    several: tuple[Inner, ...]
    maybe: Inner | None
    number: float
    flags: Tensor
    listed: list[int]


@dataclass(frozen=True)
class Stranger:
    number: int


def _outer() -> Outer:
    inner = Inner(torch.tensor([1.5, -torch.inf]), "é")
    return Outer({"a": inner}, (inner, inner), None, 0.1, torch.tensor([[True], [False]]), [1, 2])


def test_a_parcel_brings_back_what_was_packed() -> None:
    before, after = _outer(), unpacked(packed(_outer()), Outer)
    assert isinstance(after.by_name["a"], Inner) and after.by_name["a"].name == "é"
    assert torch.equal(after.several[1].values, before.several[1].values)
    assert torch.equal(after.flags, before.flags) and after.flags.dtype == torch.bool
    assert (after.maybe, after.number, after.listed) == (None, 0.1, [1, 2])


def test_only_what_is_expected_comes_out_of_a_parcel() -> None:
    with pytest.raises(KeyError, match="Stranger"):
        unpacked(packed(Stranger(1)), Outer)
    with pytest.raises(TypeError, match="a set cannot be handed"):
        packed({1, 2})


def test_alone_every_item_is_computed_when_it_is_asked_for() -> None:
    done: list[int] = []

    def work(item: int) -> tuple[Tensor]:
        done.append(item)
        return (torch.tensor(item),)

    for count, (found,) in enumerate(each([3, 1, 2], work, "items"), start=1):
        assert len(done) == count and int(found) == done[-1]


def test_what_is_not_finite_is_blamed_on_its_item() -> None:
    def work(item: float) -> tuple[Tensor, Tensor]:
        return torch.ones(2, dtype=torch.long), torch.tensor([0.0, item])

    with pytest.raises(InputError, match="item nan"):
        list(each([1.0, float("nan")], work, "items", lambda item: InputError(f"item {item}")))
    assert len(list(each([1.0, float("nan")], work, "items"))) == 2


def test_several_processes_see_all_results_in_the_items_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More items than are held at once, results of unequal shapes and types, nothing shared inside an item."""
    monkeypatch.setattr(module, "_HELD", 4)

    def work(item: int) -> tuple[Tensor, ...]:
        inner = sum(float(one) for (one,) in each(range(item), lambda i: (torch.tensor(float(i)),), "inner"))
        return torch.full((item,), item / 3), torch.tensor([item % 2 == 0]), torch.tensor(inner)

    def run() -> int:
        with joined() as ranks, together(ranks):
            print(json.dumps([[one.tolist() for one in piece] for piece in each(range(10), work, "items")]))
        return 0

    children = job(run, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    alone = [[one.tolist() for one in work(item)] for item in range(10)]
    assert [json.loads(child.said) for child in children] == [alone, alone]
