"""The model states under audit: the base, an edit, a control; each a delta on the base or a model of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from locus.delta import WeightDelta
from locus.errors import InputError
from locus.model import Model

Role = Literal["base", "edit", "control", "reference"]
"""A reference is a model retrained without the forget set: what a perfect edit would be."""

NEVER_KNEW = "never knew"
"""Name of the reference."""


@dataclass(frozen=True)
class State:
    """One state of the weights, ready to be measured."""

    name: str
    role: Role
    model: Model
    """Where it runs: for a delta the base model, which is changed only inside `active`."""
    delta: WeightDelta | None = None
    """What makes it of the base; None for a model of its own."""

    @contextlib.contextmanager
    def active(self) -> Iterator[Model]:
        """The model in this state; a delta is undone bit for bit on leaving."""
        if self.delta is None:
            yield self.model
        else:
            with self.delta.applied(self.model):
                yield self.model


def states_of(
    base: Model,
    edits: Mapping[str, WeightDelta | Model],
    controls: Mapping[str, WeightDelta | Model],
    never_knew: Model | None = None,
) -> tuple[State, ...]:
    """The base first, then the edits, the controls, and the reference where there is one.

    Raises:
        InputError: no edit, a name given twice or empty, or a checkpoint that cannot be compared with the base.
    """
    if not edits:
        raise InputError("audit: there is no edit to audit; give at least one delta or checkpoint")
    names = ["base", NEVER_KNEW, *edits, *controls]
    if twice := sorted({name for name in names if names.count(name) > 1 or not name.strip()}):
        raise InputError(
            f"audit: the name {twice[0]!r} is given twice or empty; base, reference, edits and controls need their own"
        )
    states = [State("base", "base", base)]
    for role, group in (("edit", edits), ("control", controls)):
        for name, what in group.items():
            if isinstance(what, Model):
                comparable(base, what, name)
                states.append(State(name, role, what))  # type: ignore[arg-type]
            else:
                states.append(State(name, role, base, what))  # type: ignore[arg-type]
    if never_knew is not None:
        comparable(base, never_knew, NEVER_KNEW)
        states.append(State(NEVER_KNEW, "reference", never_knew))
    return tuple(states)


def comparable(base: Model, other: Model, name: str) -> None:
    """Refuse a model that does not share the base's architecture, shape and tokens.

    Raises:
        InputError: they differ; says in what.
    """
    for what in ("architecture", "n_layers", "d_model", "d_vocab"):
        ours, theirs = getattr(base.atlas, what), getattr(other.atlas, what)
        if ours != theirs:
            raise InputError(
                f"{name}: {what} is {theirs}, the base {base.name} has {ours}; only edits of the same model compare"
            )
    if base.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(
            f"{name}: its tokenizer has other tokens than {base.name}'s; probabilities of targets would not compare"
        )
    if base.bos != other.bos:
        raise InputError(
            f"{name}: starts texts with token {other.bos}, the base with {base.bos}; load both with the same --bos"
        )
