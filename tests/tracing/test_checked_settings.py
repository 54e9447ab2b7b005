"""A misspelt choice given from Python is refused, for every localizer and the tracer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from locus.errors import InputError
from tracing import LOCALIZERS, CausalTrace

CLASSES: tuple[Any, ...] = (CausalTrace, *LOCALIZERS.values())
CHOICES = [
    (cls, field.name)
    for cls in CLASSES
    for field in fields(cls)
    if get_origin(get_type_hints(cls)[field.name]) is Literal
]


def test_the_choices_are_found() -> None:
    assert {(CausalTrace, "direction"), (CausalTrace, "method")} <= set(CHOICES)
    assert len(CHOICES) >= 15


@pytest.mark.parametrize(("cls", "name"), CHOICES)
def test_every_choice_is_checked(cls: Any, name: str) -> None:
    """By the class's own check: under test, jaxtyping would refuse the constructor's argument before it."""
    wrong = cls()
    object.__setattr__(wrong, name, "noising")
    with pytest.raises(InputError, match=f"{name} 'noising'.*not one of"):
        wrong.__post_init__()
    for value in get_args(get_type_hints(cls)[name]):
        assert getattr(cls(**{name: value}), name) == value
