"""From trained deltas to the artefact: rounding to the model's dtype, and what that lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.parametrize import Deltas
from editors.training import generator
from locus.delta import Change, WeightDelta
from locus.mask import WeightMask
from locus.model import Model

Cast = Callable[[Tensor, torch.dtype], Tensor]


def settings_of(editor: Any) -> dict[str, Any]:
    """An editor's name and hyperparameters, as JSON values."""
    return {"name": type(editor).__name__, **asdict(editor)}


def stochastic_rounding(seed: int) -> Cast:
    """Round up or down at random so that the expected value is the exact one: small updates survive on average."""
    source = generator(seed, "rounding", 0)

    def cast(exact: Tensor, dtype: torch.dtype) -> Tensor:
        nearest = exact.to(dtype)
        error = exact - nearest.to(exact.dtype)
        toward = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
        other = torch.nextafter(nearest, toward)
        gap = (other.to(exact.dtype) - nearest.to(exact.dtype)).abs()
        chance = torch.where(gap > 0, error.abs() / gap, 0.0)
        draw = torch.rand(exact.shape, generator=source, dtype=torch.float32).to(exact.device)
        return torch.where(draw < chance, other, nearest)

    return cast


def rounding_loss(
    deltas: Mapping[str, Float[Tensor, "..."]],
    old: Mapping[str, Float[Tensor, "..."]],
    new: Mapping[str, Float[Tensor, "..."]],
) -> dict[str, float]:
    """What casting to the model's dtype lost of a trained update.

    Returns:
        `unmoved`: share of the weights with a non-zero delta that are the same after the cast as before the edit;
        `error`: norm of (cast update - exact update) over the norm of the exact update. Both 0 when nothing moved.
    """
    moved, lost, error, size = 0, 0, 0.0, 0.0
    for name, delta in deltas.items():
        delta = delta.detach()
        update = new[name].to(delta.dtype) - old[name].to(delta.dtype)
        moved += int((delta != 0).sum())
        lost += int(((delta != 0) & (new[name] == old[name])).sum())
        error += float((update - delta).double().square().sum())
        size += float(delta.double().square().sum())
    return {"unmoved": lost / max(1, moved), "error": (error / size) ** 0.5 if size else 0.0}


def weight_delta(
    model: Model, mask: WeightMask, deltas: Deltas, rounding: str, seed: int, provenance: Mapping[str, Any]
) -> WeightDelta:
    """The trained deltas as the artefact: old and new values of the mask's entries, nothing else."""
    old = {name: selection.take(deltas.bases[name]) for name, selection in deltas.selections.items()}
    new = deltas.new_entries(stochastic_rounding(seed) if rounding == "stochastic" else None)
    about = {
        **provenance,
        "mask": dict(mask.provenance),
        "rounding": {"to": str(model.dtype).removeprefix("torch."), **rounding_loss(deltas.values, old, new)},
    }
    return changed_entries(model, deltas.selections, old, new, about)
