"""Erase a subspace: what sets the forget prompts apart from the retain prompts is taken out of located matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import settings_of
from editors.editor import EditData
from editors.key_value.key_positions import Place, context_prefixes, row, states, with_prefix
from editors.strength import Direction, StrengthSearch, delta_at_strength
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, neutral_text, trainable_facts
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from locus.weight_source import stored

Found = Literal["mean", "pca", "inlp"]
ProjectedSide = Literal["input", "output"]


@dataclass(frozen=True)
class EraseSubspace(StrengthSearch):
    """Project a subspace out of every located matrix, on the side it reads from or the side it writes to.

    With Q the subspace's orthonormal basis, W becomes W (I − Q Qᵀ) or (I − Q Qᵀ) W: the matrix no longer answers to
    those directions, or no longer writes them, in any text. Q is estimated from what the matrix itself reads or
    writes at the facts' positions, and is orthogonal to the first principal directions of the retain facts, which
    are therefore left exactly as they are.
    """

    directions: Found = "mean"
    """mean: difference of the forget and the retain mean; pca: principal directions of the forget facts around the
    retain mean; inlp: iterative null-space projection (Ravfogel et al. 2020, arXiv:2004.07667) with ridge
    classifiers of forget against retain."""
    rank: int = 1
    """Dimensions to erase; the mean difference has one."""
    side: ProjectedSide = "input"
    """Erase from what the matrices read, or from what they write."""
    protect: int = 32
    """Principal directions of the retain facts that the subspace is kept orthogonal to."""
    place: Place = "subject"
    """Look at the last token of the subject or of the prompt."""
    prefixes: int = 2
    """Random context prefixes of every prompt; the prompt without one is always used too."""
    strength: float = 1.0
    """Share of the projection; 1 erases, 2 reflects."""
    seed: int = 0
    """Seed of the context prefixes."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("directions", Found), ("side", ProjectedSide)):
            if getattr(self, name) not in get_args(known):
                raise InputError(f"{name} = {getattr(self, name)!r}: not one of {', '.join(get_args(known))}")
        if self.rank < 1 or self.protect < 0:
            raise InputError("rank must be at least 1, and protect not negative")
        if self.directions == "mean" and self.rank != 1:
            raise InputError("a mean difference has rank 1: take pca or inlp for more")

    def run(
        self,
        model: Model,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        mask: WeightMask,
        *,
        text: Sequence[str] = (),
        folder: Path | None = None,
        resume: bool = False,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> WeightDelta:
        """Project; memory ends bit for bit as it was. `text` gives the context prefixes, and is judged by for a goal.

        Raises:
            InputError: no forget facts, no retain facts that are not held out, or no matrix in the mask.
        """
        kept = trainable_facts(retain)
        if not forget or not kept:
            raise InputError(
                "erasing a subspace needs forget facts, and retain facts that are not held out to compare"
            )
        mask.check(model)
        matrices = {name: chosen for name, chosen in mask.entries.items() if len(chosen.shape) == 2}
        modules = {name: name.removesuffix(".weight") for name in matrices if _is_projection(model, name)}
        if not modules:
            raise InputError("the mask holds no matrix of a block: locate weights of attention or MLPs")
        prefixes = context_prefixes(text or neutral_text(), self.prefixes, self.seed)
        away = self._states(model, forget, modules, prefixes)
        others = self._states(model, kept, modules, prefixes)
        steps: dict[str, Tensor] = {}
        selections: dict[str, Selection] = {}
        for name, module in modules.items():
            basis = subspace(away[module], others[module], self.directions, self.rank, self.protect)
            weight = stored(model).read(name).double()
            transposed = _transposed(model, module)
            update = -without(weight.mT if transposed else weight, basis, self.side)
            selections[name] = matrices[name]
            steps[name] = matrices[name].take((update.mT if transposed else update).contiguous())
            bias = f"{module}.bias"
            if self.side == "output" and bias in mask.entries:
                held = stored(model).read(bias).double()
                selections[bias] = mask.entries[bias]
                steps[bias] = mask.entries[bias].take(-basis @ (basis.mT @ held))
        return delta_at_strength(
            model,
            Direction(selections, steps),
            mask,
            self.strength,
            self,
            EditData(forget, retain, text),
            provenance={"editor": settings_of(self)},
            log=log,
        )

    def _states(
        self, model: Model, facts: Sequence[Fact], modules: Mapping[str, str], prefixes: Sequence[str]
    ) -> dict[str, Float[Tensor, "row _"]]:
        """What the modules read or write at the facts' positions, by module."""
        names = list(modules.values())
        seen = [
            row(
                model, with_prefix(fact, prefix), number, self.place if fact.subject is not None else "prompt"
            )
            for number, fact in enumerate(facts)
            for prefix in ("", *prefixes)
        ]
        side = 0 if self.side == "input" else 1
        wanted = {"inputs" if side == 0 else "outputs": names}
        return states(model, seen, **wanted, batch_tokens=self.batch_tokens)[side]


def subspace(
    forget: Float[Tensor, "row d"],
    retain: Float[Tensor, "other d"],
    directions: Found,
    rank: int,
    protect: int,
) -> Float[Tensor, "d rank"]:
    """Orthonormal basis of what sets forget states apart, orthogonal to the retain states' first directions.

    Args:
        forget: States to set apart.
        retain: States to keep.
        directions: How the subspace is found, see `EraseSubspace.directions`.
        rank: Its dimension.
        protect: How many principal directions of the retain states (around zero) it is orthogonal to; never so
            many that nothing is left.

    Raises:
        InputError: less than `rank` dimensions are left.
    """
    spanned = torch.linalg.matrix_rank(retain)
    kept = torch.linalg.svd(retain, full_matrices=False).Vh[: min(protect, int(spanned))].mT
    free = [x - (x @ kept) @ kept.mT for x in (forget, retain)]
    away, others = free
    if directions == "inlp":
        basis = _inlp(away, others, rank)
    else:
        centred = away - others.mean(0)
        rows = centred.mean(0, keepdim=True) if directions == "mean" else centred
        _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
        scale = float(forget.norm(dim=1).mean())
        basis = vectors[: min(rank, int((sizes > 1e-10 * scale).sum()))].mT
    if basis.shape[1] < rank:
        raise InputError(
            f"only {basis.shape[1]} of {rank} dimensions set the forget facts apart outside the {kept.shape[1]} "
            "that are protected: lower rank or protect, or give more facts"
        )
    return basis


def without(
    weight: Float[Tensor, "out in"], basis: Float[Tensor, "d rank"], side: ProjectedSide
) -> Float[Tensor, "out in"]:
    """The part of a matrix that reads, or writes, the subspace: subtracted, the matrix is blind to it."""
    return (weight @ basis) @ basis.mT if side == "input" else basis @ (basis.mT @ weight)


def _inlp(
    away: Float[Tensor, "row d"], others: Float[Tensor, "other d"], rank: int
) -> Float[Tensor, "d rank"]:
    """Directions of ridge classifiers, each on what those before it left (Ravfogel et al. 2020)."""
    states = torch.cat([away, others])
    labels = torch.cat(
        [torch.full((len(away),), 1.0 / len(away)), torch.full((len(others),), -1.0 / len(others))]
    )
    labels = labels.to(states)
    states = states - states.mean(0)
    found: list[Tensor] = []
    for _ in range(rank):
        gram = states @ states.mT
        ridge = 1e-2 * gram.diagonal().mean()
        if not float(ridge) > 0:
            break
        eye = torch.eye(len(gram), dtype=gram.dtype)
        normal = states.mT @ torch.linalg.solve(gram + ridge * eye, labels)
        if not float(normal.norm()) > 1e-12:
            break
        normal = normal / normal.norm()
        found.append(normal)
        states = states - (states @ normal)[:, None] * normal
    return torch.stack(found, dim=1) if found else states.new_zeros(states.shape[1], 0)


def _is_projection(model: Model, name: str) -> bool:
    """Whether a parameter is the weight of a module inside a block."""
    return name.endswith(".weight") and any(name.startswith(block + ".") for block in model.atlas.blocks)


def _transposed(model: Model, module: str) -> bool:
    """Whether a projection's weight is stored as [in, out]: GPT-2's Conv1D."""
    return type(model.module.get_submodule(module)).__name__ == "Conv1D"
