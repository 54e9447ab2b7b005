"""WeightDelta: what an edit changed, with old and new values, so that it can be applied and undone to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from locus.checkpoint import Checkpoint
from locus.errors import InputError
from locus.files.artefact import open_tensors, save_tensors
from locus.files.schema import built, understood, value_of
from locus.fingerprint import tensor_digest
from locus.mask import WeightMask
from locus.parameter_names import canonical, resolve
from locus.selection import Selection, same_bits
from locus.tensor_delta import Change, InvertedChanges, Rounding, StoredChanges, cast_edit, composed
from locus.weight_source import Weights, in_memory, module_of, refuse_offloaded, stored

if TYPE_CHECKING:
    from locus.model import Model


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """A change of weights between two states of one model, sparse and exact."""

    changes: Mapping[str, Change]
    """Parameter name -> change. Read from the disk one by one where the delta was loaded."""
    before: Mapping[str, str]
    """Parameter name -> sha256 of the whole tensor it must be applied to."""
    after: Mapping[str, str]
    """Parameter name -> sha256 of the whole tensor that comes out."""
    base_fingerprint: str = ""
    """Fingerprint of the model it was made from; "" where it is not known."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that say how it came about."""
    rounding: Rounding = field(default_factory=Rounding)
    """What the cast to the checkpoint's dtype cost."""

    def __post_init__(self) -> None:
        if not set(self.changes) == set(self.before) == set(self.after):
            raise ValueError("changes, before and after must name the same tensors")

    @classmethod
    def between(
        cls,
        before: Model | nn.Module | Checkpoint | Mapping[str, Tensor],
        after: Model | nn.Module | Checkpoint | Mapping[str, Tensor],
        mask: WeightMask | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> WeightDelta:
        """Compare two states, tensor by tensor, and keep what differs.

        Args:
            before: The base. A `Model` that was read from a folder stands for its checkpoint there, so that
                the delta is in the checkpoint's dtype; anything else for the tensors it holds.
            after: The edited state: a `Model` or module stands for its memory. A mapping may hold the edited
                tensors only. In another dtype than `before`, changed entries are cast to that of `before`,
                unchanged ones keep their bits, and `rounding` says what was lost.
            mask: Where changes are allowed. Every tensor of `after` is looked at, on the mask or not.
            provenance: JSON values to keep.

        Raises:
            InputError: names or shapes do not fit, or an edited value overflows the checkpoint's dtype.
            RuntimeError: an entry outside the mask changed.
        """
        now = in_memory(after)
        return _compared(stored(before), now.names, lambda name, old: now.read(name), mask, provenance)

    @classmethod
    def of_entries(
        cls,
        base: Model | nn.Module | Checkpoint | Mapping[str, Tensor],
        entries: Mapping[str, tuple[Selection, Tensor]],
        mask: WeightMask | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> WeightDelta:
        """The delta that gives selected entries new values, without an edited copy of the model.

        Args:
            base: As `before` in `between`. A model in memory must hold its checkpoint's values.
            entries: Parameter name -> the entries and their new values, shaped as `Selection.take` gives them,
                in any dtype; cast to the base's as in `between`.
            mask: Where changes are allowed.
            provenance: JSON values to keep.

        Raises:
            InputError: names or shapes do not fit, or a new value overflows the base's dtype.
            RuntimeError: an entry outside the mask would change.
        """

        def edited(name: str, old: Tensor) -> Tensor:
            selection, values = entries[name]
            if tuple(old.shape) != selection.shape:
                raise InputError(
                    f"{name}: is {list(old.shape)} in the base, {list(selection.shape)} in the edit"
                )
            full = old.to(values.dtype, copy=True)
            selection.put_(full, values)
            return full

        return _compared(stored(base), entries, edited, mask, provenance)

    @classmethod
    def stack(cls, deltas: Sequence[WeightDelta]) -> WeightDelta:
        """One delta for several made one after the other, each on the result of those before it.

        Raises:
            InputError: no delta, or one that was not made on the result of those before it.
        """
        if not deltas:
            raise InputError("no deltas to stack")
        total = deltas[0]
        for i, delta in enumerate(deltas[1:], start=2):
            total = _stacked(total, delta, f"delta {i}")
        return total

    def unstack(self, last: WeightDelta) -> WeightDelta:
        """Take the last of a stack off again: `stack([a, b]).unstack(b)` has the changes of `a`.

        Raises:
            InputError: `last` is not the last edit in this stack.
        """
        return _stacked(self, last.inverse(), "the delta to take off")

    def inverse(self) -> WeightDelta:
        """The delta that undoes this one."""
        return WeightDelta(
            InvertedChanges(self.changes), self.after, self.before, "", self.provenance, self.rounding
        )

    @property
    def id(self) -> str:
        """sha256 hex of what it does: equal for deltas that turn the same tensors into the same tensors."""
        lines = (
            f"{canonical(n)} {self.before[n]} {self.after[n]}\n" for n in sorted(self.changes, key=canonical)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def n_changed(self) -> int:
        """Entries whose bits differ."""
        return sum(change.n_changed for change in self.changes.values())

    @property
    def norm(self) -> float:
        """Euclidean norm of the whole change."""
        return math.sqrt(sum(change.norm**2 for change in self.changes.values()))

    def norms(self) -> dict[str, float]:
        """Euclidean norm of each tensor's change."""
        return {name: change.norm for name, change in self.changes.items()}

    def outside(self, mask: WeightMask) -> int:
        """How many changed entries are not in the mask."""
        allowed = {canonical(name): chosen for name, chosen in mask.entries.items()}
        n = 0
        for name, change in self.changes.items():
            changed = torch.zeros(change.selection.shape, dtype=torch.bool)
            change.selection.put_(changed, ~same_bits(change.old, change.new))
            n += _outside(changed, allowed.get(canonical(name)))
        return n

    def to_json(self) -> dict[str, Any]:
        """What changed, in numbers."""
        tensors = {
            name: {
                "kind": change.selection.kind,
                "n_changed": change.n_changed,
                "norm": change.norm,
                "relative_norm": change.relative_norm,
            }
            for name, change in self.changes.items()
        }
        return {
            "n_changed": self.n_changed,
            "norm": self.norm,
            "rounding": self.rounding.to_json(),
            "tensors": tensors,
        }

    def apply_(self, model: Model | nn.Module) -> None:
        """Write the new values into a model in memory.

        In another dtype than the delta's the new values are cast; `applied` undoes that to the bit.

        Raises:
            InputError: the model does not hold the old values (nothing is written then).
        """
        for parameter, change in self._checked(model):
            change.selection.put_(parameter, change.new.to(parameter.dtype))

    def revert_(self, model: Model | nn.Module) -> None:
        """Write the old values back into a model in memory.

        Raises:
            InputError: the model does not hold the new values (nothing is written then).
        """
        self.inverse().apply_(model)

    @contextlib.contextmanager
    def applied(self, model: Model | nn.Module) -> Iterator[None]:
        """Hold the new values in a model while the block runs; afterwards every bit is as it was.

        Raises:
            InputError: the model does not hold the old values.
        """
        kept: list[tuple[Tensor, Selection, Tensor]] = []
        try:
            for parameter, change in list(self._checked(model)):
                kept.append((parameter, change.selection, change.selection.take(parameter)))
                change.selection.put_(parameter, change.new.to(parameter.dtype))
            yield
        finally:
            for parameter, selection, values in reversed(kept):
                selection.put_(parameter, values)

    def save(self, path: str | Path) -> None:
        """Write kind "delta": for each tensor the index, old and new values.

        Raises:
            InputError: `path` cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        entries: dict[str, Any] = {}
        for name, change in self.changes.items():
            form, data = change.selection.stored()
            entries[name] = {
                "form": form,
                "shape": list(change.selection.shape),
                "before": self.before[name],
                "after": self.after[name],
            }
            tensors[f"{name}:old"], tensors[f"{name}:new"] = change.old, change.new
            if data is not None:
                tensors[f"{name}:index"] = data
        meta = {
            "entries": entries,
            "base_fingerprint": self.base_fingerprint,
            "provenance": dict(self.provenance),
            "rounding": asdict(self.rounding),
        }
        save_tensors(path, "delta", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> WeightDelta:
        """Read what `save` wrote. All of it is checked; values stay on the disk until they are used.

        Raises:
            InputError: missing, damaged, or not a delta.
        """
        file, meta = open_tensors(path, "delta")
        with understood(path, "delta", "edit again"):
            entries = dict(meta["entries"])
            changes = StoredChanges(
                file, {name: (e["form"], tuple(e["shape"])) for name, e in entries.items()}
            )
            for name in changes:
                changes.half(name, changes.selection(name), "new")  # so that a bad one is told now
            before = {name: str(entry["before"]) for name, entry in entries.items()}
            after = {name: str(entry["after"]) for name, entry in entries.items()}
            about = {
                "base_fingerprint": value_of(str, meta["base_fingerprint"], "base_fingerprint"),
                "provenance": value_of(Mapping[str, Any], meta["provenance"], "provenance"),
                "rounding": built(Rounding, meta["rounding"]),
            }
            return cls(changes, before, after, **about)

    def _checked(self, model: Model | nn.Module) -> Iterator[tuple[Tensor, Change]]:
        """Each touched parameter with its change, after all of them were found to hold the old values."""
        parameters = dict(module_of(model).named_parameters(remove_duplicate=False))
        names = {name: resolve(name, parameters, "the model") for name in self.changes}
        refuse_offloaded({name: parameters[known] for name, known in names.items()})
        for name, change in self.changes.items():
            self._check_base(name, change, parameters[names[name]])
        return ((parameters[names[name]], change) for name, change in self.changes.items())

    def _check_base(self, name: str, change: Change, tensor: Tensor) -> None:
        if tuple(tensor.shape) != change.selection.shape:
            raise InputError(
                f"{name}: is {list(tensor.shape)} in the model and {list(change.selection.shape)} in the delta: "
                "it was made for another model"
            )
        if tensor.dtype == change.old.dtype:
            self.check_digest(name, tensor_digest(tensor), "the model")
            return
        now, old = change.selection.take(tensor).cpu(), change.old.to(tensor.dtype)
        if not bool((same_bits(now, old) | (now.isnan() & old.isnan())).all()):
            raise InputError(self._wrong_base(name, "the model"))

    def check_digest(self, name: str, digest: str, where: str) -> None:
        """Refuse a tensor that is not the one this delta was made from.

        Raises:
            InputError: says which tensor, and what to do.
        """
        if digest == self.after[name]:
            raise InputError(f"{name}: {where} already holds the values that would be written; nothing to do")
        if digest != self.before[name]:
            raise InputError(self._wrong_base(name, where))

    def _wrong_base(self, name: str, where: str) -> str:
        known = f" (fingerprint {self.base_fingerprint[:12]}…)" if self.base_fingerprint else ""
        return (
            f"{name}: {where} does not hold the values this delta was made from; take the checkpoint it was made "
            f"from{known}, or revert later edits first"
        )


def _compared(
    base: Weights,
    names: Iterable[str],
    edited: Callable[[str, Tensor], Tensor],
    mask: WeightMask | None,
    provenance: Mapping[str, Any] | None,
) -> WeightDelta:
    """The delta from `base` to what `edited` makes of each of its tensors."""
    allowed = None if mask is None else {canonical(name): chosen for name, chosen in mask.entries.items()}
    changes: dict[str, Change] = {}
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    rounding = Rounding()
    for name in sorted(names):
        old = base.read(name)
        new, wanted, lost = cast_edit(name, old, edited(name, old))
        if wanted is None:
            continue
        rounding += lost
        if allowed is not None and (n_off := _outside(wanted, allowed.get(canonical(name)))):
            raise RuntimeError(f"{name}: {n_off} weights outside the mask changed; the edit is not usable")
        changed = ~same_bits(old, new)
        if bool(changed.any()):
            chosen = Selection.covering(changed, old.element_size())
            changes[name] = Change(chosen, chosen.take(old), chosen.take(new))
            before[name], after[name] = tensor_digest(old), tensor_digest(new)
    fingerprint = base.fingerprint() or (mask.fingerprint if mask else "")
    return WeightDelta(changes, before, after, fingerprint, dict(provenance or {}), rounding)


def _outside(changed: Tensor, allowed: Selection | None) -> int:
    return int(changed.sum() if allowed is None else (changed & ~allowed.dense()).sum())


def _stacked(first: WeightDelta, second: WeightDelta, what: str) -> WeightDelta:
    mine = {canonical(name): name for name in first.changes}
    theirs = {mine.get(canonical(name), name): name for name in second.changes}
    changes, before, after = dict(first.changes), dict(first.before), dict(first.after)
    for name, their in theirs.items():
        if name not in changes:
            changes[name], before[name] = second.changes[their], second.before[their]
        elif first.after[name] != second.before[their]:
            raise InputError(
                f"{name}: {what} was not made on the result of those before it; check their order"
            )
        else:
            changes[name] = composed(changes[name], second.changes[their])
        after[name] = second.after[their]
    undone = {name for name in changes if before[name] == after[name]}
    for table in (changes, before, after):
        for name in undone:
            del table[name]
    provenance = {"stack": [dict(first.provenance), dict(second.provenance)]}
    return WeightDelta(
        changes, before, after, first.base_fingerprint, provenance, first.rounding + second.rounding
    )
