"""Values from a file against the types they should have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from locus.errors import InputError
from locus.files.schema import built, understood, value_of


@dataclass(frozen=True)
class Leaf:
    name: str
    role: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Tree:
    size: int
    leaves: tuple[Leaf, ...]
    span: tuple[int, int] | None = None


def test_a_dataclass_comes_back_with_tuples_for_lists():
    made = built(Tree, {"size": 2, "leaves": [{"name": "x"}, {"name": "y", "role": "b"}], "span": [0, 1]})
    assert made == Tree(2, (Leaf("x"), Leaf("y", "b")), (0, 1))


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ([], "not a tree"),
        ({"size": 2}, "leaves is missing"),
        ({"size": 2, "leaves": [], "more": 1}, "more is missing or unknown"),
        ({"size": True, "leaves": []}, "tree.size is True: int"),
        ({"size": 2, "leaves": [{"name": "x", "role": "c"}]}, "leaf.role is 'c'"),
        ({"size": 2, "leaves": [], "span": [0, 1, 2]}, "tree.span"),
        ({"size": 2, "leaves": "xy"}, "tree.leaves is 'xy'"),
    ],
)
def test_what_does_not_fit_is_named(obj, said):
    with pytest.raises(InputError, match=said):
        built(Tree, obj)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None])
def test_only_finite_numbers_are_floats(value):
    with pytest.raises(InputError):
        value_of(float, value, "x")


def test_an_int_is_a_float_too_and_mappings_are_looked_into():
    assert value_of(Mapping[str, float], {"a": 1}, "x") == {"a": 1.0}
    with pytest.raises(InputError, match=r"x\.a"):
        value_of(Mapping[str, float], {"a": "b"}, "x")
    assert value_of(Mapping[str, Any], {"a": [None]}, "x") == {"a": [None]}


def test_whatever_goes_wrong_while_taking_a_file_apart_is_one_line():
    for wrong in (lambda: {}["k"], lambda: 1 / 0, lambda: [][0], lambda: None.x, lambda: int("a\nb")):
        with (
            pytest.raises(InputError, match=r"f\.json: not a thing that locus wrote") as caught,
            understood("f.json", "thing"),
        ):
            wrong()
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyboardInterrupt), understood("f.json", "thing"):
        raise KeyboardInterrupt
