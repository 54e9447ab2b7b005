"""How strongly each neuron or layer is tied to the target: what every localizer returns.

A localizer scores; a budget turns scores into a mask. Higher always means more tied to the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.atlas import Atlas
from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood, value_of
from locus.mask import WeightMask

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class NeuronScores:
    """One score for each FFN neuron of the model."""

    values: Float[Tensor, "layer neuron"]
    """Higher is more tied to the target."""
    method: str
    """Name of the localizer in the table of methods."""
    fingerprint: str
    """Fingerprint of the model that was scored."""
    atlas: Atlas
    """Names and shapes of that model's parts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The localizer's hyperparameters."""

    def __post_init__(self) -> None:
        expected = (self.atlas.n_layers, self.atlas.d_mlp)
        if tuple(self.values.shape) != expected:
            raise ValueError(
                f"scores of shape {tuple(self.values.shape)} for a model of [layer, neuron] {expected}"
            )
        bad = torch.isnan(self.values).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise InputError(
                f"{self.method}: NaN scores in layer {bad[0]} (of {len(bad)} such layers): the model's activations or "
                "gradients are not finite there; try --dtype float32"
            )

    @property
    def layer_profile(self) -> Float[Tensor, " layer"]:
        """Share of the total positive score in each layer."""
        positive = self.values.clamp(min=0).sum(dim=1).double()
        return (positive / positive.sum().clamp(min=1e-300)).float()

    def choose(self, budget: float | int | str, *, per_layer: bool = False) -> Bool[Tensor, "layer neuron"]:
        """The highest-scoring neurons: `budget` of all of them, or of each layer. See `count_of`.

        Ties go to the lower layer, then the lower neuron, so that the choice never depends on the machine.
        """
        n_layers, d_mlp = self.values.shape
        if per_layer:
            k = count_of(budget, d_mlp)
            chosen = torch.zeros_like(self.values, dtype=torch.bool)
            for layer in range(n_layers):
                chosen[layer, _top(self.values[layer], k)] = True
            return chosen
        chosen = torch.zeros(n_layers * d_mlp, dtype=torch.bool)
        chosen[_top(self.values.flatten(), count_of(budget, n_layers * d_mlp))] = True
        return chosen.view(n_layers, d_mlp)

    def top(
        self, budget: float | int | str, *, per_layer: bool = False, parts: Sequence[str] = PARTS
    ) -> WeightMask:
        """The weights of the highest-scoring neurons.

        Args:
            budget: A fraction (0.01, "1%") or a count (300, "300") of neurons.
            per_layer: Take that many of each layer instead of the whole model's best.
            parts: Which weights of a neuron: its key vectors (gate, up) and its value vector (down); biases go
                with their key vectors.

        Raises:
            InputError: a budget that chooses no neuron or more than there are, or an unknown part.
        """
        return self.mask_of(
            self.choose(budget, per_layer=per_layer), parts, budget=str(budget), per_layer=per_layer
        )

    def above_threshold(self, threshold: float, *, parts: Sequence[str] = PARTS) -> WeightMask:
        """The weights of the neurons whose score is above a threshold.

        Raises:
            InputError: there are none, or an unknown part.
        """
        chosen = self.values > threshold
        if not bool(chosen.any()):
            best = float(self.values.max())
            raise InputError(f"{self.method}: no score is above {threshold:g}, the highest is {best:.3g}")
        return self.mask_of(chosen, parts, threshold=threshold)

    def mask_of(
        self, chosen: Bool[Tensor, "layer neuron"], parts: Sequence[str] = PARTS, **how: Any
    ) -> WeightMask:
        """The weights of the chosen neurons, with this scoring as the mask's provenance."""
        if unknown := set(parts) - set(PARTS):
            raise InputError(f"neuron part {sorted(unknown)[0]!r}: not one of {', '.join(PARTS)}")
        provenance = {"method": self.method, "settings": dict(self.settings), "parts": list(parts), **how}
        return WeightMask.of_neurons(self.atlas, chosen, parts, self.fingerprint, provenance)

    def save(self, path: str | Path) -> None:
        """Write kind "neuron-scores": one tensor `values`, settings and atlas in the header."""
        meta = {
            "method": self.method,
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "atlas": self.atlas.to_json(),
        }
        save_tensors(Path(path), "neuron-scores", {"values": self.values.float().contiguous()}, meta)

    @classmethod
    def load(cls, path: str | Path) -> NeuronScores:
        """Read what `save` wrote. Raises InputError for anything else."""
        tensors, meta = load_tensors(Path(path), "neuron-scores")
        with understood(path, "file of neuron scores", "locate again"):
            said = {key: value_of(str, meta[key], key) for key in ("method", "fingerprint")}
            settings = value_of(Mapping[str, Any], meta["settings"], "settings")
            return cls(tensors["values"], **said, atlas=Atlas.from_json(meta["atlas"]), settings=settings)


@dataclass(frozen=True)
class LayerScores:
    """One score for each layer; its neurons share it."""

    values: Float[Tensor, " layer"]
    """Higher is more tied to the target."""
    method: str
    """Name of the localizer in the table of methods."""
    fingerprint: str
    """Fingerprint of the model that was scored."""
    atlas: Atlas
    """Names and shapes of that model's parts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The localizer's hyperparameters."""

    def top_layers(self, n: int) -> Int[Tensor, " n"]:
        """The n highest-scoring layers, in ascending order."""
        return _top(self.values, count_of(n, len(self.values))).sort().values


def count_of(budget: float | int | str, n: int) -> int:
    """How many of `n` things a budget stands for.

    A fraction is a float in (0, 1] or text with a percent sign or a decimal point ("1%", "0.01"); a count is
    an integer or text of digits. A fraction never rounds down to nothing.

    Raises:
        InputError: not a number, not positive, or more than there are.
    """
    text = str(budget).strip()
    try:
        if text.endswith("%"):
            fraction, count = float(text[:-1]) / 100, None
        elif isinstance(budget, float) or any(c in text for c in ".eE"):
            fraction, count = float(text), None
        else:
            fraction, count = 0.0, int(text)
    except ValueError:
        raise InputError(f"budget {budget!r}: give a fraction (0.01 or 1%) or a count (300)") from None
    if count is None:
        if not 0 < fraction <= 1:
            raise InputError(f"budget {budget!r}: a fraction lies above 0 and at most at 1 (100%)")
        count = max(1, round(fraction * n))
    if not 1 <= count <= n:
        raise InputError(f"budget {budget!r}: there are {n} to choose from; give 1 to {n}")
    return count


def _top(values: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Indices of the k largest values, ties to the lower index."""
    return torch.sort(values, descending=True, stable=True).indices[:k]
