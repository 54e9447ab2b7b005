"""Settings given from Python are checked as those of the command line are: a misspelt choice is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from locus.errors import InputError

T = TypeVar("T")


def checked_choices(cls: type[T]) -> type[T]:
    """Let a dataclass refuse values that its `Literal` fields do not list; stands below `@dataclass`.

    The class's own `__post_init__` runs afterwards.
    """
    own = cls.__dict__.get("__post_init__")

    def post_init(self: Any) -> None:
        check_choices(self)
        if own is not None:
            own(self)

    cls.__post_init__ = post_init  # type: ignore[attr-defined]
    return cls


def check_choices(settings: Any) -> None:
    """Check every field of a dataclass whose type lists its values.

    Raises:
        InputError: a value that is not listed; names field, value and the choices.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        hint, value = hints[field.name], getattr(settings, field.name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and value not in choices:
            raise InputError(
                f"{type(settings).__name__}: {field.name} {value!r}: not one of {', '.join(map(str, choices))}"
            )
