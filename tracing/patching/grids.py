"""A fact's grids: which cells are asked, and the answers put back in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from locus.trace import FactTrace
from tracing.patching.corruption import Prepared
from tracing.patching.runs import Asked, Inputs, RunScores
from tracing.patching.sites import Kind, PatchedRun


@dataclass(frozen=True)
class Grids:
    """For each kind, the cell of every layer and position; None where the two runs do not differ yet."""

    index: Mapping[Kind, Sequence[Sequence[int | None]]]
    cells: tuple[PatchedRun, ...]
    """Every cell once: windows clipped to the same layers are one."""

    @classmethod
    def of(cls, rows: Mapping[Kind, Sequence[Sequence[PatchedRun]]], diverges: int) -> Grids:
        """Number the cells; those that patch only positions before `diverges` change nothing and get no number."""
        numbers: dict[PatchedRun, int] = {}

        def number(cell: PatchedRun) -> int | None:
            if all(q < diverges for patch in cell.patches for q in patch.positions):
                return None
            return numbers.setdefault(cell, len(numbers))

        index = {kind: [[number(cell) for cell in row] for row in grid] for kind, grid in rows.items()}
        return cls(index, tuple(numbers))

    @property
    def n_cells(self) -> int:
        """Cells of all grids, those without a number too."""
        return sum(len(grid) * len(grid[0]) for grid in self.index.values())

    def numbers(self, kinds: Sequence[Kind]) -> list[int]:
        """Numbers of the cells of some kinds, ascending."""
        return sorted({i for kind in kinds for row in self.index[kind] for i in row if i is not None})

    def fill(
        self, kind: Kind, values: Shaped[Tensor, " cell"], elsewhere: Shaped[Tensor, ""]
    ) -> Shaped[Tensor, "layer pos"]:
        """The grid of one kind with each cell's value, and `elsewhere` where there is no cell."""
        rows = [[elsewhere if i is None else values[i] for i in row] for row in self.index[kind]]
        return torch.stack([torch.stack(row) for row in rows])


@dataclass(frozen=True)
class Estimates:
    """First-order estimates of the cells, and which of them were answered exactly."""

    values: Float[Tensor, "cell draw"]
    """The metric with that cell patched; NaN where there is no estimate."""
    exact: tuple[int, ...]
    """Numbers of the cells that were answered, in order of the answers."""


@dataclass(frozen=True)
class Plan:
    """One fact on its way through an engine: what is asked, and where the answers go."""

    one: Prepared
    corrupted: Inputs
    asked: Asked
    grids: Grids
    estimates: Estimates | None
    """None where every cell is answered."""


def assemble(
    plan: Plan, answers: RunScores, *, denoising: bool, engine: str, work: Mapping[str, float]
) -> FactTrace:
    """A fact's trace out of what an engine answered, and what was only estimated."""
    one, grids, estimates = plan.one, plan.grids, plan.estimates
    samples = drawn(answers)
    base = answers.base.double()[:, 0].expand(samples)
    answered = answers.cells.double()[..., 0]
    if estimates is None:
        cells, known = answered, torch.ones(len(answered), dtype=torch.bool)
    else:
        cells, known = (
            estimates.values.double()[:, :samples].clone(),
            torch.zeros(len(grids.cells), dtype=torch.bool),
        )
        cells[list(estimates.exact)], known[list(estimates.exact)] = answered, True
    mean, error = cells.mean(dim=1), standard_error(cells)
    clean, corrupted = (answers.other, answers.base) if denoising else (answers.base, answers.other)
    clean_score, clean_prob = clean.double().mean(dim=0).tolist()
    corrupted_score, corrupted_prob = corrupted.double().mean(dim=0).tolist()
    at_base = (base.mean(), standard_error(base[None])[0])
    certain = {kind: grids.fill(kind, known, torch.tensor(True)) for kind in grids.index}
    return FactTrace(
        fact_id=one.fact.id,
        prompt=one.fact.prompt,
        target=one.fact.target,
        tokens=one.encoded.tokens[: one.encoded.target_start],
        subject=one.encoded.subject,
        corrupted=plan.corrupted.positions,
        scores={kind: grids.fill(kind, mean, at_base[0]).float() for kind in grids.index},
        standard_error={kind: grids.fill(kind, error, at_base[1]).float() for kind in grids.index},
        clean_prob=clean_prob,
        corrupted_prob=corrupted_prob,
        clean_score=clean_score,
        corrupted_score=corrupted_score,
        seed=one.seed,
        samples=samples,
        patched_forwards=(grids.n_cells if estimates is None else len(estimates.exact)) * samples,
        engine=engine,
        verified={} if estimates is None else certain,
        rank_correlation={} if estimates is None else _correlations(grids, estimates, answered, samples),
        work=work,
    )


def most_promising(
    grids: Grids, kinds: Sequence[Kind], values: Float[Tensor, "cell draw"], base: float, fraction: float
) -> tuple[int, ...]:
    """Of each kind, the cells whose estimate is farthest from the base run: `fraction` of them, at least one."""
    chosen: set[int] = set()
    for kind in kinds:
        own = grids.numbers([kind])
        if not own:
            continue
        effect = (values[own].double().mean(dim=1) - base).abs()
        top = effect.sort(descending=True, stable=True).indices[: max(1, round(fraction * len(own)))]
        chosen |= {own[i] for i in top.tolist()}
    return tuple(sorted(chosen))


def _correlations(
    grids: Grids, estimates: Estimates, answered: Float[Tensor, "cell draw"], samples: int
) -> dict[Kind, float]:
    """Spearman's rank correlation of estimated and exact scores over the verified cells of each kind."""
    from scipy.stats import spearmanr

    place = {cell: i for i, cell in enumerate(estimates.exact)}
    out = {}
    for kind in grids.index:
        own = [i for i in grids.numbers([kind]) if i in place]
        guess = estimates.values[own, :samples].double().mean(dim=1)
        exact = answered[[place[i] for i in own]].mean(dim=1)
        if (
            len(own) > 2
            and bool(guess.isfinite().all())
            and float(guess.std()) > 0
            and float(exact.std()) > 0
        ):
            out[kind] = float(spearmanr(guess.numpy(), exact.numpy()).statistic)
    return out


def drawn(answers: RunScores) -> int:
    """Draws of a question's answers."""
    return max(answers.base.shape[0], answers.other.shape[0])


def join_draws(a: RunScores, b: RunScores) -> RunScores:
    """Answers for other draws of the same question, as one; a run that has a single draw keeps it."""
    draws = a.cells.shape[1]
    return RunScores(
        torch.cat([a.base, b.base]) if a.base.shape[0] == draws else a.base,
        torch.cat([a.other, b.other]) if a.other.shape[0] == draws else a.other,
        torch.cat([a.cells, b.cells], dim=1),
        a.tokens + b.tokens,
    )


def standard_error(draws: Float[Tensor, "cell draw"]) -> Float[Tensor, " cell"]:
    """Of the mean over draws; 0 for a single one."""
    n = draws.shape[1]
    return draws.std(dim=1) / n**0.5 if n > 1 else torch.zeros_like(draws[:, 0])
