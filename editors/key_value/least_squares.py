"""The closed forms behind ROME, MEMIT and AlphaEdit, as linear algebra and nothing else.

A matrix W maps keys to values. An update D is asked to send keys K (columns) to residuals R, D K = R, and costs
what it changes elsewhere: tr(D C Dᵀ) = E‖D k‖² over text. Everything is float64. With G = Kᵀ C⁻¹ K every update
is R (G + λ I)⁻¹ Kᵀ C⁻¹, so no matrix larger than C is ever factored, and C only once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from locus.errors import InputError

_POWER_STEPS = 30


@dataclass(frozen=True, eq=False)
class SecondMomentMetric:
    """C = E[k kᵀ] + ridge · mean(diag E[k kᵀ]) · I, factored."""

    matrix: Float[Tensor, "neuron neuron"]
    """C, the ridge included."""
    factor: Float[Tensor, "neuron neuron"]
    """Its lower Cholesky factor."""
    ridge: float
    """What was added to the diagonal, as a share of its mean."""
    condition: float
    """Estimate (from below, by power iteration) of C's 2-norm condition number."""

    @classmethod
    def of(cls, moment: Float[Tensor, "neuron neuron"], ridge: float) -> SecondMomentMetric:
        """Factor a second moment.

        Args:
            moment: Symmetric, positive semi-definite.
            ridge: Added to the diagonal, as a share of the diagonal's mean; >= 0.

        Raises:
            InputError: not positive definite, because the text is too short or a neuron never fires.
        """
        if ridge < 0:
            raise InputError(f"ridge {ridge}: must not be negative")
        moment = moment.double()
        matrix = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) or not bool(torch.isfinite(factor).all()):
            raise InputError(
                f"the second moment of {len(matrix)} neurons is not positive definite (ridge {ridge:g}): "
                "read more text, or raise the ridge"
            )
        return cls(matrix, factor, ridge, _condition(matrix, factor))

    def solve(self, keys: Float[Tensor, "neuron key"]) -> Float[Tensor, "neuron key"]:
        """C⁻¹ K."""
        return torch.cholesky_solve(keys, self.factor)

    def cost(self, update: Float[Tensor, "out neuron"]) -> float:
        """tr(D C Dᵀ): the mean squared change of the output over the text."""
        return float(((update @ self.matrix) * update).sum())


def least_squares_update(
    metric: SecondMomentMetric,
    keys: Float[Tensor, "neuron key"],
    residual: Float[Tensor, "out key"],
    weight: float = 0.0,
) -> Float[Tensor, "out neuron"]:
    """The update that sends the keys to the residuals and costs least.

    weight = 0: D K = R exactly, the cheapest such D. For one key it is ROME's rank-one edit (Meng et al. 2022,
    arXiv:2202.05262), for several EMMET's (Gupta et al. 2024, arXiv:2403.14236). A key with residual 0 is one
    that must stay where it is.
    weight > 0: the minimum of ‖D K − R‖² + weight · tr(D C Dᵀ), which is MEMIT's R Kᵀ (weight · C + K Kᵀ)⁻¹
    (Meng et al. 2023, arXiv:2210.07229).

    Raises:
        InputError: weight is 0 and the keys are linearly dependent.
    """
    if weight < 0:
        raise InputError(f"weight {weight}: must not be negative")
    solved = metric.solve(keys)
    gram = keys.mT @ solved
    scale = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    normed = scale[:, None] * gram * scale
    if not weight and float(torch.linalg.eigvalsh(normed)[0]) < 1e-10:
        raise InputError(
            "two facts look the same to this layer (their keys depend on each other): edit them one at a time, "
            "give longer prompts, or use a method that weighs them (memit)"
        )
    gram = gram + weight * torch.eye(len(gram), dtype=gram.dtype)
    update: Tensor = torch.linalg.solve(gram, residual.mT).mT @ solved.mT
    return update


@dataclass(frozen=True, eq=False)
class NullSpace:
    """The directions in which text hardly moves: C's eigenvectors of small eigenvalue."""

    basis: Float[Tensor, "neuron free"]
    """Orthonormal columns U; P = U Uᵀ is AlphaEdit's projection."""
    kept: float
    """tr(P C) / tr(C): the share of the text's energy that still lies in it."""

    @classmethod
    def of(cls, moment: Float[Tensor, "neuron neuron"], threshold: float) -> NullSpace:
        """Eigenvectors of E[k kᵀ] whose eigenvalue is below `threshold` times the mean eigenvalue.

        Raises:
            InputError: there is none.
        """
        values, vectors = torch.linalg.eigh(moment.double())
        free = values < threshold * values.mean()
        if not bool(free.any()):
            raise InputError(
                f"no direction of {len(values)} has less than {threshold:g} of the mean energy over the text: "
                "raise the threshold"
            )
        return cls(vectors[:, free], float(values[free].clamp_min(0).sum() / values.sum()))


def write_within(
    space: NullSpace,
    keys: Float[Tensor, "neuron key"],
    residual: Float[Tensor, "out key"],
    l2: float,
    earlier: Float[Tensor, "neuron earlier"] | None = None,
) -> Float[Tensor, "out neuron"]:
    """AlphaEdit's update (Fang et al. 2025, arXiv:2410.02355): D = D P, so that D C stays small whatever D.

    The minimum of ‖D K − R‖² + ‖D K_earlier‖² + l2 · ‖D‖² over D = D P. Equal to the paper's
    R Kᵀ P (K_e K_eᵀ P + K Kᵀ P + l2 · I)⁻¹, but symmetric and of the null space's size.

    Args:
        space: P.
        keys: To be sent to `residual`.
        residual: Where to.
        l2: > 0.
        earlier: Keys of earlier edits, to be left where they are.

    Raises:
        InputError: l2 is not positive.
    """
    if not l2 > 0:
        raise InputError(f"l2 {l2}: must be positive")
    inside = space.basis.mT @ keys
    if earlier is not None and earlier.numel():
        inside = torch.cat([inside, space.basis.mT @ earlier], dim=1)
        residual = torch.cat([residual, residual.new_zeros(len(residual), earlier.shape[1])], dim=1)
    gram = inside.mT @ inside + l2 * torch.eye(inside.shape[1], dtype=inside.dtype)
    update: Tensor = torch.linalg.solve(gram, residual.mT).mT @ inside.mT @ space.basis.mT
    return update


def within(moment: Float[Tensor, "neuron neuron"], neurons: Int64[Tensor, " n"]) -> Float[Tensor, "n n"]:
    """The second moment of some neurons: the metric of an update that has no other columns."""
    return moment if len(neurons) == len(moment) else moment[neurons][:, neurons]


def _condition(matrix: Tensor, factor: Tensor) -> float:
    """λ_max / λ_min by power iteration on C and on C⁻¹, from fixed starts."""
    source = torch.Generator().manual_seed(0)
    largest = smallest = torch.tensor(1.0, dtype=matrix.dtype)
    up = torch.randn(len(matrix), 1, generator=source, dtype=matrix.dtype)
    down = up.clone()
    for _ in range(_POWER_STEPS):
        up = matrix @ (up / up.norm())
        down = torch.cholesky_solve(down / down.norm(), factor)
        largest, smallest = up.norm(), down.norm()
    return float(largest * smallest)
