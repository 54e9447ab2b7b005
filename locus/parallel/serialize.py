"""A dataclass of tensors as plain tensors, to be handed from one process of a job to another; never pickled.

One tensor holds the bytes of a JSON text that says how the value is built, the others are its tensors. Only the
dataclasses that the expected type itself names can come out again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T")


def packed(value: Any) -> tuple[Tensor, ...]:
    """The value as tensors.

    Raises:
        TypeError: something in it is neither a tensor nor built of JSON's types, tuples and dataclasses.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_plain(value, tensors)).encode()
    return (torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors)


def unpacked(parcel: Sequence[Tensor], cls: type[T]) -> T:
    """What `packed` was given: an instance of `cls`.

    Raises:
        KeyError: it holds a dataclass that `cls` does not name.
    """
    known: dict[str, type] = {}
    _collect(cls, known)
    found: T = _built(json.loads(bytes(parcel[0].tolist())), parcel[1:], known)
    return found


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        return {"of": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"map": [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_plain(one, tensors) for one in value]}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be handed to another process")


def _built(made: Any, tensors: Sequence[Tensor], known: Mapping[str, type]) -> Any:
    match made:
        case {"tensor": int(index)}:
            return tensors[index]
        case {"of": str(name), "fields": dict(fields)}:
            return known[name](**{key: _built(one, tensors, known) for key, one in fields.items()})
        case {"map": list(pairs)}:
            return {_built(k, tensors, known): _built(v, tensors, known) for k, v in pairs}
        case {"tuple": list(items)}:
            return tuple(_built(one, tensors, known) for one in items)
        case {"list": list(items)}:
            return [_built(one, tensors, known) for one in items]
    return made


def _collect(hint: Any, known: dict[str, type]) -> None:
    """Every dataclass that a type names, by its own name."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint.__name__ not in known:
            known[hint.__name__] = hint
            for inner in get_type_hints(hint).values():
                _collect(inner, known)
        return
    for inner in get_args(hint):
        _collect(inner, known)
