"""What a result was made from, as digests: the one definition of "the same inputs" for everything that can be resumed.

A command that takes up finished work compares `input_digests` now with those it kept beside the work. Equal digests
mean that running again would give the same result; `differing` names what is not equal, down to the field of a fact.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact
from locus.fingerprint import configuration, tensor_digest
from locus.model import Model

Digests = Mapping[str, Any]
"""Name of an input -> its digest, or the digests of its parts by their names."""

WITHOUT_EFFECT: Mapping[type, frozenset[str]] = {Fact: frozenset({"source"})}
"""Fields on which no result depends: where a fact was read is said in messages only."""


def digest_of(value: Any) -> str:
    """Digest of a value by its content: 32 hexadecimal digits.

    Args:
        value: JSON's types, tuples, sets, paths, tensors, dtypes, and dataclasses of those. A dataclass counts with
            the name of its class and every field, but for those `WITHOUT_EFFECT`.

    Raises:
        TypeError: something in it is none of these, so that its text might change from run to run.
    """
    text = json.dumps(_plain(value), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fact_digests(facts: Sequence[Fact]) -> dict[str, str]:
    """Field of `Fact` -> digest of that field over all the facts, in their order."""
    names = [field.name for field in dataclasses.fields(Fact) if field.name not in WITHOUT_EFFECT[Fact]]
    return {name: digest_of([getattr(fact, name) for fact in facts]) for name in names}


def model_digests(model: Model) -> dict[str, str]:
    """What the model's answers depend on: its weights, and how they are read and asked."""
    said = configuration(model.module)
    attention = said.pop("attention")
    tokenizer = json.loads(model.tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left by the last call, and set anew by each
        tokenizer.pop(state, None)
    template = getattr(model.tokenizer, "chat_template", None) if model.chat else None
    return {
        "weights": model.fingerprint,
        "configuration": digest_of(said),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention implementation": str(attention),
        "tokenizer": digest_of(tokenizer),
        "beginning-of-sequence token": str(model.bos),
        "chat form": digest_of([model.chat, template]),
    }


def input_digests(
    model: Model,
    *,
    facts: Mapping[str, Sequence[Fact] | None] | None = None,
    settings: Any = None,
    **others: Any,
) -> dict[str, Any]:
    """Everything a result is made from, each input under the name that a message may call it by.

    Args:
        model: The model it is made of.
        facts: Name of a set of facts -> the facts; None where there is none.
        settings: The method's settings.
        others: Further inputs by name (underscores are read as spaces): a text, a mask's digest, a seed.

    Returns:
        JSON values, to be kept beside the result.
    """
    found: dict[str, Any] = {"model": model_digests(model)}
    for name, listed in (facts or {}).items():
        found[name] = fact_digests(listed or ())
    if settings is not None:
        found["settings"] = _setting_digests(settings)
    return found | {name.replace("_", " "): digest_of(value) for name, value in others.items()}


def differing(before: Digests, now: Digests) -> list[str]:
    """The inputs that are not the same, by name: "forget facts: prompt", "model: dtype"."""
    return list(_differing(before, now, ""))


def refuse_changed(what: str, before: Any, now: Digests) -> None:
    """Refuse to take up finished work that was made from other inputs.

    Args:
        what: The work, as the message names it: "out/edit holds an edit".
        before: The digests kept beside it; None where a version that kept none wrote it.
        now: The digests of what was given.

    Raises:
        InputError: they differ; the message names the inputs.
    """
    mend = "give another folder, or delete it first"
    if not isinstance(before, Mapping):
        raise InputError(
            f"{what} that does not say what it was made from (an earlier version wrote it): {mend}"
        )
    if changed := differing(before, now):
        named = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise InputError(f"{what} made with other inputs ({named}): {mend}")


def _differing(before: Digests, now: Digests, under: str) -> Iterator[str]:
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{under}{name}: ")
        elif old != new:
            yield f"{under}{name}"


def _setting_digests(settings: Any) -> dict[str, Any]:
    """Every setting under its own name, those of nested dataclasses under theirs."""
    if not dataclasses.is_dataclass(settings):
        return {str(name): digest_of(value) for name, value in dict(settings).items()}
    found: dict[str, Any] = {"method": type(settings).__name__}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        found[field.name] = _setting_digests(value) if dataclasses.is_dataclass(value) else digest_of(value)
    return found


def _plain(value: Any) -> Any:
    """JSON's own types, in one way for equal values."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return {"number": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        ignored = WITHOUT_EFFECT.get(type(value), frozenset())
        fields = [field.name for field in dataclasses.fields(value) if field.name not in ignored]
        return {"class": type(value).__name__, "fields": {f: _plain(getattr(value, f)) for f in fields}}
    if isinstance(value, Mapping):
        return {"map": sorted(([_plain(key), _plain(one)] for key, one in value.items()), key=repr)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted((_plain(one) for one in value), key=repr)}
    if isinstance(value, Tensor):
        return {"tensor": tensor_digest(value)}
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no digest by its content")
