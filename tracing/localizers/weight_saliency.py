"""Weight-level saliency: a score for every single weight, from gradients of the target's log-probability.

With g the gradient of the mean log p(target) over the forget facts, g_r over the retain facts, t the weight:
    gradient         |g|                        SalUn (Fan et al. 2024, arXiv:2310.12508): sum, then absolute
    weight-gradient  |g t|                      first-order effect of zeroing (SNIP, Lee et al. 2019)
    fisher           mean over facts of g_i^2   diagonal empirical Fisher
    difference       |g| - |g_r|
    ratio            |g| / (|g_r| + 1e-3 mean |g_r|)
    wagle            |(mu t - g_r) g|           WAGLE (Jia et al. 2024, arXiv:2410.17509): its (t - g_r / mu) g times
                                                mu, the same order without its overflow; mu = 1e-6 as in its code

Scores take the gradients' place in memory: weights + one gradient + one mask of the chosen few, and for the scores
that need two gradients, or one per example, a second of one group of parameters (`groups` of them, one after the
other). The k best are found in a stream (`top_k`); nothing is ever sorted. Sums are kept in the weights' dtype: in
bfloat16 small contributions round away, so give few large batches there.

Use it where single weights are edited (masked fine-tuning in SalUn's way); neurons are coarser but keep their
gradients, optimizer and artefact small. Cost: one forward and one backward per fact, times `groups`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from locus.atlas import Atlas
from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood
from locus.finite_checks import is_finite
from locus.forward import Batch, batches
from locus.mask import WeightMask
from locus.model import Model
from locus.parallel.map import all_reduce, own_part
from locus.progress import track
from locus.scores import PARTS, count_of
from locus.selection import Selection
from locus.tokens import Encoded
from tracing.checked_settings import checked_choices
from tracing.gradients.neuron_gradients import label_logprobs
from tracing.gradients.top_k import top_of
from tracing.localizer import Cost, ExampleLoop, Examples, encode_facts, required

Score = Literal["gradient", "weight-gradient", "fisher", "difference", "ratio", "wagle"]
CONTRASTS: tuple[Score, ...] = ("difference", "ratio", "wagle")
"""Scores that need a retain set."""
WAGLE_MU = 1e-6


@dataclass(frozen=True)
class WeightScores:
    """One score for each weight of some parameters."""

    values: Mapping[str, Tensor]
    """Parameter name -> scores of its shape; higher is more tied to the target."""
    method: str
    """Name of the localizer in the table of methods."""
    fingerprint: str
    """Fingerprint of the model that was scored."""
    atlas: Atlas
    """Names and shapes of that model's parts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The localizer's hyperparameters."""

    def top(
        self, budget: float | int | str, *, per_layer: bool = False, parts: Sequence[str] = PARTS
    ) -> WeightMask:
        """The highest-scoring weights.

        Args:
            budget: A fraction (0.01, "1%") or a count (300000) of the scored weights.
            per_layer: Take that many of each parameter instead of all parameters' best.
            parts: Which of the neurons' tensors may be in the mask; other parameters always may.

        Raises:
            InputError: a budget out of range, or NaN among the scores.
        """
        values = self._allowed(parts)
        pools = [{name: tensor} for name, tensor in values.items()] if per_layer else [dict(values)]
        entries = {
            name: Selection.of(where)
            for pool in pools
            for name, where in top_of(pool, count_of(budget, sum(t.numel() for t in pool.values())))
        }
        how = {"budget": str(budget), "per_layer": per_layer, "parts": list(parts)}
        provenance = {"method": self.method, "settings": dict(self.settings), **how}
        return WeightMask(entries, self.fingerprint, provenance)

    def above_threshold(self, threshold: float, *, parts: Sequence[str] = PARTS) -> WeightMask:
        """The weights whose score is above a threshold.

        Raises:
            InputError: there are none.
        """
        values = self._allowed(parts)
        mask = WeightMask(  # a parameter after the other: all at once would be a byte per weight
            {name: Selection.of(tensor > threshold) for name, tensor in values.items()},
            self.fingerprint,
            {
                "method": self.method,
                "settings": dict(self.settings),
                "threshold": threshold,
                "parts": list(parts),
            },
        )
        if not mask.n_weights:
            best = max(float(tensor.max()) for tensor in values.values())
            raise InputError(f"{self.method}: no score is above {threshold:g}, the highest is {best:.3g}")
        return mask

    def _allowed(self, parts: Sequence[str]) -> Mapping[str, Tensor]:
        roles: dict[str, set[str]] = {}
        for layer in self.atlas.neurons:
            for part in layer:
                roles.setdefault(part.param, set()).add(part.role.removesuffix("_bias"))
        return {
            name: tensor
            for name, tensor in self.values.items()
            if name not in roles or roles[name] & set(parts)
        }

    def save(self, path: str | Path) -> None:
        """Write kind "weight-scores": one tensor a parameter."""
        meta = {
            "method": self.method,
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "atlas": self.atlas.to_json(),
        }
        save_tensors(Path(path), "weight-scores", dict(self.values), meta)

    @classmethod
    def load(cls, path: str | Path) -> WeightScores:
        """Read what `save` wrote. Raises InputError for anything else."""
        tensors, meta = load_tensors(Path(path), "weight-scores")
        with understood(path, "file of weight scores", "locate again"):
            atlas = Atlas.from_json(meta["atlas"])
            return cls(tensors, meta["method"], meta["fingerprint"], atlas, meta["settings"])


@dataclass(frozen=True)
@checked_choices
class WeightSaliency:
    """Saliency of single weights; the budget counts weights."""

    score: Score = "gradient"
    """Which of the module's formulas."""
    parameters: tuple[str, ...] = ("*",)
    """Names or shell patterns of the parameters that are scored ("*.mlp.*")."""
    groups: int = 1
    """Parts that the parameters are taken in, one after the other: less memory, as many times the passes."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and at most one backward per example and group, over both sets for a contrast."""
        n_examples = len(facts) + (len(retain or ()) if self.score in CONTRASTS else 0)
        return Cost(n_examples, n_examples) * self.groups

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> WeightScores:
        """Score the weights on `facts`, against `retain` where the score is a contrast.

        Raises:
            InputError: no facts, a contrast without a retain set, a pattern that names no parameter, or no groups.
        """
        if self.groups < 1:
            raise InputError(f"groups is {self.groups}: the parameters are taken in at least one")
        kept = required(retain, f"score {self.score!r}") if self.score in CONTRASTS else None
        parameters = named(model, self.parameters)
        names = list(parameters)
        size = -(-len(names) // self.groups)
        values: dict[str, Tensor] = {}
        for start in range(0, len(names), size):
            group = {name: parameters[name] for name in names[start : start + size]}
            if self.score == "fisher":
                values |= squared_gradients(model, facts, group)
                continue
            forget = mean_gradients(model, facts, group, batch_tokens=batch_tokens)
            against = mean_gradients(model, kept, group, batch_tokens=batch_tokens) if kept else {}
            for name, gradient in forget.items():
                values[name] = _score_(self.score, gradient, against.pop(name, None), group[name].detach())
        return WeightScores(values, "weight-saliency", model.fingerprint, model.atlas, asdict(self))


def _wide_enough(dtype: torch.dtype) -> torch.dtype:
    """Where products of gradients are kept: half precision has no room below 6e-8, where most of them lie."""
    return torch.float32 if dtype == torch.float16 else dtype


def _score_(score: Score, gradient: Tensor, retain: Tensor | None, weight: Tensor) -> Tensor:
    """The score in the gradient's place, or in float32 where half precision would lose it."""
    if score in ("weight-gradient", "wagle"):
        wide = _wide_enough(gradient.dtype)
        gradient, retain = gradient.to(wide), None if retain is None else retain.to(wide)
    if score == "weight-gradient":
        gradient.mul_(weight)
    if score == "wagle" and retain is not None:
        return gradient.mul_(retain.neg_().add_(weight, alpha=WAGLE_MU)).abs_()
    gradient.abs_()
    if retain is not None:
        retain.abs_()
        if score == "difference":
            gradient.sub_(retain)
        else:
            floor = (1e-3 * retain.float().mean()).clamp(min=torch.finfo(retain.dtype).tiny)
            gradient.div_(retain.add_(floor.to(retain)))
    return gradient


def named(model: Model, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Parameters by name or shell pattern, in the model's order; tied ones once.

    Raises:
        InputError: a pattern that matches nothing, or a parameter that is offloaded and so can have no gradient.
    """
    parameters = dict(model.module.named_parameters())
    wanted: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            raise InputError(f"parameters {pattern!r}: {model.name} has none of this name or pattern")
        wanted |= set(found)
    if away := [name for name in parameters if name in wanted and parameters[name].is_meta]:
        raise InputError(
            f"{away[0]}: offloaded, so it has no gradient; load the model without a device_map that offloads, or name "
            "other parameters"
        )
    return {name: parameter for name, parameter in parameters.items() if name in wanted}


def mean_gradients(
    model: Model, facts: Examples, parameters: Mapping[str, Tensor], *, batch_tokens: int = 4096
) -> dict[str, Tensor]:
    """Gradient of the mean log p(target), in the weights' dtype; parameters that get none are zero."""
    encoded = encode_facts(model, facts)

    def add(batch: Batch) -> None:
        (label_logprobs(model, batch).sum() / len(encoded)).backward()

    taken = _with_gradients(parameters, batches(encoded, batch_tokens), add)
    total = {
        name: taken[name] if name in taken else torch.zeros_like(p.detach()) for name, p in parameters.items()
    }
    all_reduce(list(total.values()))
    _refuse_nan(model, facts, encoded, total)
    return total


def _refuse_nan(
    model: Model, facts: Examples, encoded: Sequence[Encoded], gradients: Mapping[str, Tensor]
) -> None:
    """An InputError that names layer and fact where a gradient is NaN or infinite."""
    if not all(is_finite(gradient) for gradient in gradients.values()):
        raise ExampleLoop(model, facts, encoded, "the gradient of their weights").at_fault(
            range(len(encoded))
        )


def squared_gradients(model: Model, facts: Examples, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean over facts of the squared gradient of log p(target): one backward per fact."""
    encoded = encode_facts(model, facts)
    total = {
        name: torch.zeros_like(parameter, dtype=_wide_enough(parameter.dtype))
        for name, parameter in parameters.items()
    }

    def add(batch: Batch) -> None:
        label_logprobs(model, batch).sum().backward()
        for name, gradient in _taken(parameters).items():
            wide = gradient.to(total[name].dtype)
            total[name].addcmul_(wide, wide, value=1 / len(encoded))

    _with_gradients(parameters, batches(encoded, 1), add)
    all_reduce(list(total.values()))
    _refuse_nan(model, facts, encoded, total)
    return total


def _with_gradients(
    parameters: Mapping[str, Tensor], groups: Sequence[Batch], add: Callable[[Batch], None]
) -> dict[str, Tensor]:
    """Let these parameters have gradients while `add` runs on each batch; what it leaves in them, taken away.

    Of several processes each runs its part of the batches: gradients of all weights are too large to be handed round.
    """
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for batch in track(own_part(groups), "gradients"):
                add(batch)
    finally:
        taken = _taken(parameters)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return taken


def _taken(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients there are, no longer the parameters'."""
    taken = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            taken[name] = parameter.grad.detach()
        parameter.grad = None
    return taken
