"""What changed: tensors, entries, norms, the spectrum of the change, bits off the mask, loss by rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from locus.delta import WeightDelta
from locus.mask import WeightMask
from locus.model import Model
from locus.parameter_names import canonical
from locus.selection import Selection, same_bits

_N_SINGULAR = 8


@dataclass(frozen=True)
class TensorChange:
    """One touched tensor."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """Form of the selection: all, rows, columns or elements."""
    n_changed: int
    """Entries whose bits differ."""
    n_rows: int
    """Rows of a matrix with such an entry; 0 for what is not a matrix."""
    norm: float
    """Frobenius norm of the change."""
    relative_norm: float
    """That norm over the norm of the old values of the same entries."""
    largest: float
    """Largest absolute change of one entry."""
    singular_values: tuple[float, ...]
    """The largest ones of the change, descending; empty for what is not a matrix."""
    lost_bfloat16: float
    """Share of the changed entries whose change disappears when both sides are cast to bfloat16."""
    off_mask: int | None
    """Changed entries outside the mask; None where no mask was given."""


@dataclass(frozen=True)
class WeightChange:
    """What one edit did to the weights."""

    tensors: tuple[TensorChange, ...]
    n_parameters: int
    """Of the whole model."""
    lost_cast: float | None = None
    """Share of the entries the edit changed that its cast to the checkpoint's dtype took back; None where unknown."""
    n_allowed: int | None = None
    """Weights of the mask that the edit kept to, as its delta says; None where it does not."""

    @property
    def n_changed(self) -> int:
        """Entries whose bits differ."""
        return sum(t.n_changed for t in self.tensors)

    @property
    def off_mask(self) -> int | None:
        """Changed entries outside the mask; None where no mask was given."""
        counts = [t.off_mask for t in self.tensors]
        known = [c for c in counts if c is not None]
        return sum(known) if counts and len(known) == len(counts) else None

    def to_json(self) -> dict[str, Any]:
        """Totals and one record a tensor; a number that is not finite is None."""
        totals: dict[str, Any] = _finite(self._to_json())
        return totals

    def _to_json(self) -> dict[str, Any]:
        changed = self.n_changed
        lost = sum(t.lost_bfloat16 * t.n_changed for t in self.tensors)
        return {
            "n_tensors": sum(t.n_changed > 0 for t in self.tensors),
            "n_rows": sum(t.n_rows for t in self.tensors),
            "n_changed": changed,
            "n_parameters": self.n_parameters,
            "share": changed / max(1, self.n_parameters),
            "norm": float(sum(t.norm**2 for t in self.tensors) ** 0.5),
            "lost_bfloat16": lost / changed if changed else 0.0,
            "lost_cast": self.lost_cast,
            "off_mask": self.off_mask,
            "n_allowed": self.n_allowed,
            "tensors": [
                asdict(t) | {"shape": list(t.shape), "singular_values": list(t.singular_values)}
                for t in self.tensors
            ],
        }


def change_of(base: Model, edit: WeightDelta | Model, mask: WeightMask | None = None) -> WeightChange:
    """What an edit changed, from its delta or from a second checkpoint in memory."""
    pieces = _of_delta(edit) if isinstance(edit, WeightDelta) else _of_models(base, edit)
    allowed = None if mask is None else {canonical(name): chosen for name, chosen in mask.entries.items()}
    tensors = tuple(_one(name, selection, old, new, allowed) for name, selection, old, new in pieces)
    cast = edit.rounding.fraction_vanished if isinstance(edit, WeightDelta) else None
    n_parameters = sum(p.numel() for p in base.module.parameters())
    return WeightChange(tensors, n_parameters, cast, _n_allowed(edit, sum(t.n_changed for t in tensors)))


def _n_allowed(edit: WeightDelta | Model, n_changed: int) -> int | None:
    """Size of the mask, where the delta says it and does not contradict itself."""
    said = edit.provenance.get("n_weights") if isinstance(edit, WeightDelta) else None
    return said if isinstance(said, int) and said >= n_changed else None


def _of_delta(delta: WeightDelta) -> Iterator[tuple[str, Selection, Tensor, Tensor]]:
    for name, change in delta.changes.items():
        yield name, change.selection, change.old, change.new


def _of_models(base: Model, other: Model) -> Iterator[tuple[str, Selection, Tensor, Tensor]]:
    theirs = dict(other.module.named_parameters())
    for name, old in base.module.named_parameters():
        new = theirs[name].detach().to(old.device, old.dtype)
        if bool((changed := ~same_bits(old.detach(), new)).any()):
            selection = Selection.covering(changed, old.element_size())
            yield name, selection, selection.take(old), selection.take(new)


def _one(
    name: str, selection: Selection, old: Tensor, new: Tensor, allowed: Mapping[str, Selection] | None
) -> TensorChange:
    moved = ~same_bits(old, new)
    step = new.float() - old.float()
    n = int(moved.sum())
    lost = moved & (old.to(torch.bfloat16) == new.to(torch.bfloat16))
    norm = float(step.norm())
    return TensorChange(
        name=name,
        shape=tuple(selection.shape),
        kind=selection.kind,
        n_changed=n,
        n_rows=_rows(selection, moved),
        norm=norm,
        relative_norm=norm / max(float(old.float().norm()), 1e-30),
        largest=float(step.abs().max()) if step.numel() else 0.0,
        singular_values=_singular_values(step),
        lost_bfloat16=int(lost.sum()) / n if n else 0.0,
        off_mask=None if allowed is None else _off_mask(selection, moved, allowed.get(canonical(name))),
    )


def _rows(selection: Selection, moved: Tensor) -> int:
    if len(selection.shape) != 2:
        return 0
    everywhere = torch.zeros(selection.shape, dtype=torch.bool)
    selection.put_(everywhere, moved.cpu())
    return int(everywhere.any(1).sum())


def _off_mask(selection: Selection, moved: Tensor, allowed: Selection | None) -> int:
    if allowed is None:
        return int(moved.sum())
    everywhere = torch.zeros(selection.shape, dtype=torch.bool)
    selection.put_(everywhere, moved.cpu())
    return int((everywhere & ~allowed.dense()).sum())


def _singular_values(step: Tensor) -> tuple[float, ...]:
    """The largest singular values of a matrix of changes (its zero rows and columns do not matter)."""
    if step.dim() != 2 or not step.numel() or not torch.isfinite(step).all():
        return ()
    q = min(_N_SINGULAR, *step.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = torch.svd_lowrank(step.cpu(), q=q, niter=4)[1]
    return tuple(float(v) for v in values)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
