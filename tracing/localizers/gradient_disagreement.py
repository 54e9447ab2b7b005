"""Where two gradients disagree: rows or columns (PCGU) and whole tensors (MemFlex).

- `ContrastiveVectors`, after PCGU (Yu et al. 2023, "Unlearning Bias in Language Models by Partitioning Gradients"):
  every weight matrix is divided into its rows (or columns); those whose gradients for the target and for a contrastive
  answer have the lowest cosine similarity are where the model tells the two apart. The contrast is each fact's first
  alternative; without alternatives, the retain set. Score = minus the cosine.
- `DisagreeingTensors`, after MemFlex (Tian et al. 2024, arXiv:2407.01920): whole tensors whose gradients on the forget
  and on the retain set have a cosine below 0.92 and whose mean |forget gradient| is above 6e-4.
  Score = mean |gradient| / 6e-4 where the cosine is below its limit, else 0; `above_threshold(1)` is the
  paper's choice.

Use them where an editor takes rows, columns or tensors. Cost: one forward and one backward per example of either
set; memory of two gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.atlas import Atlas
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood
from locus.mask import WeightMask
from locus.model import Model
from locus.scores import PARTS, count_of
from locus.selection import Selection
from tracing.checked_settings import checked_choices
from tracing.gradients.top_k import top_of
from tracing.localizer import Cost, Examples, required
from tracing.localizers.weight_saliency import mean_gradients, named

Units = Literal["rows", "columns", "all"]


@dataclass(frozen=True)
class UnitScores:
    """One score for each row, each column, or the whole, of some parameters."""

    values: Mapping[str, Float[Tensor, " unit"]]
    """Parameter name -> scores; higher is more tied to the target."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of those parameters."""
    units: Units
    """What a score stands for."""
    method: str
    """Name of the localizer."""
    fingerprint: str
    """Fingerprint of the model that was scored."""
    atlas: Atlas
    """Names and shapes of that model's parts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The localizer's hyperparameters."""

    def top(
        self, budget: float | int | str, *, per_layer: bool = False, parts: Sequence[str] = PARTS
    ) -> WeightMask:
        """The highest-scoring units: a fraction or count of all, or of each parameter; `parts` is not used.

        Raises:
            InputError: a budget out of range, or NaN among the scores.
        """
        pools = [{name: t} for name, t in self.values.items()] if per_layer else [dict(self.values)]
        chosen = {
            name: where
            for pool in pools
            for name, where in top_of(pool, count_of(budget, sum(len(t) for t in pool.values())))
        }
        return self._mask(chosen, {"budget": str(budget), "per_layer": per_layer})

    def above_threshold(self, threshold: float, *, parts: Sequence[str] = PARTS) -> WeightMask:
        """The units whose score is above a threshold; `parts` is not used.

        Raises:
            InputError: there are none.
        """
        chosen = {name: scores > threshold for name, scores in self.values.items()}
        if not any(bool(where.any()) for where in chosen.values()):
            best = max(float(scores.max()) for scores in self.values.values())
            raise InputError(f"{self.method}: no score is above {threshold:g}, the highest is {best:.3g}")
        return self._mask(chosen, {"threshold": threshold})

    def save(self, path: str | Path) -> None:
        """Write kind "unit-scores": one tensor a parameter."""
        meta = {
            "method": self.method,
            "units": self.units,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "atlas": self.atlas.to_json(),
        }
        save_tensors(Path(path), "unit-scores", dict(self.values), meta)

    @classmethod
    def load(cls, path: str | Path) -> UnitScores:
        """Read what `save` wrote. Raises InputError for anything else."""
        tensors, meta = load_tensors(Path(path), "unit-scores")
        with understood(path, "file of scores", "locate again"):
            shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
            atlas = Atlas.from_json(meta["atlas"])
            return cls(
                tensors, shapes, meta["units"], meta["method"], meta["fingerprint"], atlas, meta["settings"]
            )

    def _mask(self, chosen: Mapping[str, Tensor], how: Mapping[str, Any]) -> WeightMask:
        entries = {}
        for name, where in chosen.items():
            if bool(where.any()):
                index = None if self.units == "all" else where.nonzero().flatten()
                entries[name] = Selection(self.units, index, self.shapes[name])
        provenance = {"method": self.method, "settings": dict(self.settings), **how}
        return WeightMask(entries, self.fingerprint, provenance)


@dataclass(frozen=True)
@checked_choices
class ContrastiveVectors:
    """Rows or columns whose gradients for the target and a contrastive answer agree least."""

    units: Literal["rows", "columns"] = "rows"
    """How weight matrices are divided."""
    parameters: tuple[str, ...] = ("*",)
    """Names or shell patterns; of these, the two-dimensional ones are scored."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward per example of either set."""
        n_examples = len(facts) + len(alternatives_of(facts) or retain or ())
        return Cost(n_examples, n_examples)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> UnitScores:
        """Compare the gradients of the targets with those of the alternatives, or of `retain`.

        Raises:
            InputError: no facts, or neither alternatives nor a retain set.
        """
        contrast = alternatives_of(facts) or required(
            retain, "contrastive-vectors, with facts that have no alternatives,"
        )
        scored = {n: p for n, p in named(model, self.parameters).items() if p.dim() == 2}
        if not scored:
            raise InputError(f"parameters {', '.join(self.parameters)}: no weight matrix among them")
        one = mean_gradients(model, facts, scored, batch_tokens=batch_tokens)
        other = mean_gradients(model, contrast, scored, batch_tokens=batch_tokens)
        dim = 1 if self.units == "rows" else 0
        values = {name: -_cosine(one[name], other.pop(name), dim).cpu() for name in scored}
        shapes = {name: tuple(p.shape) for name, p in scored.items()}
        return UnitScores(
            values, shapes, self.units, "contrastive-vectors", model.fingerprint, model.atlas, asdict(self)
        )


@dataclass(frozen=True)
class DisagreeingTensors:
    """Whole tensors with large forget gradients that point elsewhere than the retain gradients."""

    PAPER_THRESHOLD: ClassVar[float] = 1.0
    """Scores above it pass both of the paper's limits."""

    cosine: float = 0.92
    """The gradients' cosine must be below."""
    magnitude: float = 6e-4
    """The mean |forget gradient| must be above; a score of 1 is just that."""
    parameters: tuple[str, ...] = ("*",)
    """Names or shell patterns of the parameters that are scored."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward per example of either set."""
        n_examples = len(facts) + len(retain or ())
        return Cost(n_examples, n_examples)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> UnitScores:
        """Compare the gradients of `facts` and `retain`, tensor by tensor.

        Raises:
            InputError: no facts, or no retain set.
        """
        kept = required(retain, "disagreeing-tensors")
        scored = named(model, self.parameters)
        one = mean_gradients(model, facts, scored, batch_tokens=batch_tokens)
        other = mean_gradients(model, kept, scored, batch_tokens=batch_tokens)
        values = {}
        for name in scored:
            agree = float(_cosine(one[name].reshape(1, -1), other.pop(name).reshape(1, -1), 1))
            size = float(one[name].float().abs().mean()) / self.magnitude
            values[name] = torch.tensor([size if agree < self.cosine else 0.0])
        shapes = {name: tuple(p.shape) for name, p in scored.items()}
        return UnitScores(
            values, shapes, "all", "disagreeing-tensors", model.fingerprint, model.atlas, asdict(self)
        )


def alternatives_of(facts: Examples) -> list[Example]:
    """Each fact with its first wrong answer; empty where a fact has none."""
    found = [Example(f.prompt, f.alternatives[0]) for f in facts if isinstance(f, Fact) and f.alternatives]
    return found if len(found) == len(facts) else []


def _cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Cosine along a dimension; 1, no disagreement, where a vector is zero."""
    a, b = a.float(), b.float()
    product, size = (a * b).sum(dim), a.norm(dim=dim) * b.norm(dim=dim)
    return torch.where(
        size == 0, torch.ones_like(size), product / size.clamp(min=torch.finfo(size.dtype).tiny)
    )
