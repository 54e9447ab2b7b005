"""The model states under audit: the base, an edit, a control; each a delta on the base or a model of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from locus.delta import WeightDelta
from locus.errors import InputError
from locus.input_digest import model_digests
from locus.model import Model
from locus.parameter_names import resolve

StateRole = Literal["base", "edit", "control", "reference"]
"""A reference is a model retrained without the forget set: what a perfect edit would be."""

NEVER_KNEW = "never knew"
"""Name of the reference."""


@dataclass(frozen=True)
class State:
    """One state of the weights, ready to be measured."""

    name: str
    role: StateRole
    model: Model
    """Where it runs: for a delta the base model, which is changed only inside `active`."""
    delta: WeightDelta | None = None
    """What makes it of the base; None for a model of its own."""

    @property
    def identity(self) -> Any:
        """Which weights these are, beside the base: equal for equal ones."""
        made_by = model_digests(self.model) if self.delta is None else self.delta.id
        return [self.name, self.role, made_by]

    @contextlib.contextmanager
    def active(self) -> Iterator[Model]:
        """The model in this state; a delta is undone bit for bit on leaving."""
        if self.delta is None:
            yield self.model
        else:
            with self.delta.applied(self.model):
                yield self.model

    @contextlib.contextmanager
    def at_strength(self, base: Model, strength: float) -> Iterator[Model]:
        """The base with its weights moved `strength` of the way to this state, 0 to 1 and beyond.

        The base is back, bit for bit, on leaving.
        """
        if strength == 0:
            yield base
        elif strength == 1:
            with self.active() as model:
                yield model
        elif self.delta is not None:
            with self.delta.applied(base):
                held = dict(base.module.named_parameters(remove_duplicate=False))
                for name, change in self.delta.changes.items():
                    values = torch.lerp(change.old.float(), change.new.float(), strength)
                    parameter = held[resolve(name, held, "the model")]
                    change.selection.put_(parameter.data, values.to(parameter.device, parameter.dtype))
                yield base
        else:
            with _interpolated(base, self.model, strength):
                yield base


@contextlib.contextmanager
def _interpolated(base: Model, other: Model, strength: float) -> Iterator[None]:
    """The base's weights moved towards those of another model of its shape."""
    theirs = dict(other.module.named_parameters())
    saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, parameter in base.module.named_parameters():
                new = theirs[name].to(parameter.device)
                if not torch.equal(new, parameter):
                    saved[name] = parameter.detach().clone()
                    parameter.copy_(torch.lerp(parameter.float(), new.float(), strength))
        yield
    finally:
        with torch.no_grad():
            for name, old in saved.items():
                base.module.get_parameter(name).copy_(old)


def states_of(
    base: Model,
    edits: Mapping[str, WeightDelta | Model],
    controls: Mapping[str, WeightDelta | Model],
    never_knew: Model | None = None,
) -> tuple[State, ...]:
    """The base first, then the edits, the controls, and the reference where there is one.

    Raises:
        InputError: no edit, a name given twice or empty, a checkpoint that cannot be compared with the base, or a
            control that is an edit or another control.
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
    _refuse_copies(edits, controls)
    if never_knew is not None:
        comparable(base, never_knew, NEVER_KNEW)
        states.append(State(NEVER_KNEW, "reference", never_knew))
    return tuple(states)


def _refuse_copies(
    edits: Mapping[str, WeightDelta | Model], controls: Mapping[str, WeightDelta | Model]
) -> None:
    """Refuse a control that does the same to the weights as an edit or as another control."""
    seen = dict(edits)
    for name, control in controls.items():
        if twin := next((other for other, what in seen.items() if _same_change(control, what)), None):
            raise InputError(
                f"audit: {name} is {twin} itself, bit for bit, and no control: make controls with "
                "`locus edit --controls`, or give each once"
            )
        seen[name] = control


def _same_change(a: WeightDelta | Model, b: WeightDelta | Model) -> bool:
    """Whether two edits of one base leave the same weights."""
    if isinstance(a, WeightDelta) and isinstance(b, WeightDelta):
        return a.id == b.id
    if isinstance(a, Model) and isinstance(b, Model):
        theirs = dict(b.module.named_parameters())
        return all(torch.equal(p, theirs[name]) for name, p in a.module.named_parameters())
    delta, model = (a, b) if isinstance(a, WeightDelta) else (b, a)
    assert isinstance(delta, WeightDelta) and isinstance(model, Model)
    held = dict(model.module.named_parameters(remove_duplicate=False))
    for name, change in delta.changes.items():
        values = change.selection.take(held[resolve(name, held, "the model")]).cpu()
        if not torch.equal(values.to(change.new.dtype), change.new):
            return False
    return bool(delta.changes)


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
