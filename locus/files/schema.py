"""What a file says, held against the types it should have: whoever wrote it may not have been locus."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from locus.errors import InputError

T = TypeVar("T")


@contextlib.contextmanager
def understood(path: str | Path, kind: str, mend: str = "make it again") -> Iterator[None]:
    """Turn what goes wrong inside into one line: the file is not the `kind` that locus writes.

    Only for code that takes apart what was read from `path`.

    Raises:
        InputError: anything that values of unexpected types or sizes lead to.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: not a {kind} that locus wrote ({what}); {mend}") from error


def built(cls: type[T], obj: Any) -> T:
    """An instance of a dataclass from the JSON object of its fields, each of the type it declares.

    Lists become tuples. Fields with a default may be left out.

    Raises:
        InputError: a field is missing, unknown or of another type.
    """
    name = cls.__name__.lower()
    if not isinstance(obj, Mapping):
        raise InputError(f"not a {name}: {_short(obj)}")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if wrong := (needed - set(obj)) | (set(obj) - {f.name for f in fields}):
        raise InputError(f"not a {name}: field {', '.join(sorted(wrong))[:60]} is missing or unknown")
    hints = get_type_hints(cls)
    return cls(**{key: value_of(hints[key], value, f"{name}.{key}") for key, value in obj.items()})


def value_of(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the type that a hint asks for: plain types, literals, unions, tuples, mappings, dataclasses.

    Raises:
        InputError: it is of another type, or a number that is not finite.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return built(hint, value)
    if origin in (Union, UnionType):
        for one in inner:
            with contextlib.suppress(InputError):
                return value_of(one, value, where)
    elif origin is Literal and value in [one for one in inner if type(one) is type(value)]:
        return value
    elif origin is tuple and isinstance(value, list | tuple):
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(hints) == len(value):
            return tuple(
                value_of(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True))
            )
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: value_of(inner[1], one, f"{where}.{key}") for key, one in value.items()}
    elif hint is float and type(value) in (int, float) and _finite(value):
        return float(value)
    elif hint in (NoneType, None) and value is None:
        return None
    elif hint in (int, str, bool) and type(value) is hint and not (hint is int and abs(value) >= 1 << 53):
        return value
    raise InputError(f"{where} is {_short(value)}: {_named(hint)} was expected")


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
