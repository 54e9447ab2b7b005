"""The closed forms against dense solves of the problems they claim to solve, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from editors.key_value.least_squares import (
    NullSpace,
    SecondMomentMetric,
    least_squares_update,
    within,
    write_within,
)
from locus.errors import InputError

N, OUT = 12, 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int = 0, samples: int = 40) -> Tensor:
    k = draw(seed, N, samples) * torch.linspace(0.2, 2.0, N, dtype=torch.float64)[:, None]
    return k @ k.mT / samples


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_exact_write_is_the_cheapest_update_that_meets_its_equations() -> None:
    metric, keys, residual = SecondMomentMetric.of(moment(), 0.0), draw(1, N, 3), draw(2, OUT, 3)
    update = least_squares_update(metric, keys, residual)
    close(update @ keys, residual)
    # The optimality conditions, solved densely row by row: [2C K; Kᵀ 0] [d; m] = [0; r].
    system = torch.cat(
        [
            torch.cat([2 * metric.matrix, keys], dim=1),
            torch.cat([keys.mT, torch.zeros(3, 3, dtype=torch.float64)], dim=1),
        ]
    )
    wanted = torch.cat([torch.zeros(N, OUT, dtype=torch.float64), residual.mT])
    close(update, torch.linalg.solve(system, wanted)[:N].mT)
    for seed in range(5):
        other = draw(seed + 10, OUT, N)
        other = other - other @ keys @ torch.linalg.pinv(keys)  # moves no key
        assert metric.cost(update + 0.1 * other) > metric.cost(update)


def test_one_key_is_rome() -> None:
    """(v* − W k) uᵀ / (uᵀ k), u = C⁻¹ k."""
    metric, key, weight, value = (
        SecondMomentMetric.of(moment(), 0.0),
        draw(1, N, 1),
        draw(2, OUT, N),
        draw(3, OUT, 1),
    )
    u = torch.linalg.inv(metric.matrix) @ key
    by_hand = (value - weight @ key) @ u.mT / (u.mT @ key)
    update = least_squares_update(metric, key, value - weight @ key)
    close(update, by_hand)
    close((weight + update) @ key, value)


def test_weighed_write_is_memit() -> None:
    metric, keys, residual, weight = SecondMomentMetric.of(moment(), 0.0), draw(1, N, 3), draw(2, OUT, 3), 0.7
    dense = residual @ keys.mT @ torch.linalg.inv(weight * metric.matrix + keys @ keys.mT)
    close(least_squares_update(metric, keys, residual, weight), dense)


def test_more_keys_than_neurons_can_still_be_weighed() -> None:
    metric, keys, residual, weight = (
        SecondMomentMetric.of(moment(), 0.0),
        draw(1, N, 20),
        draw(2, OUT, 20),
        0.7,
    )
    dense = residual @ keys.mT @ torch.linalg.inv(weight * metric.matrix + keys @ keys.mT)
    close(least_squares_update(metric, keys, residual, weight), dense)


def test_erases_exactly_one_key_of_a_linear_associative_memory() -> None:
    """W = Σ vᵢ kᵢᵀ over orthonormal keys; the second is sent to zero, all others keep their values."""
    keys = torch.linalg.qr(draw(0, N, N))[0]
    values = draw(1, OUT, N)
    weight = values @ keys.mT
    metric = SecondMomentMetric.of(keys @ keys.mT / N, 0.0)
    chosen = keys[:, 1:2]
    edited = weight + least_squares_update(metric, chosen, -weight @ chosen)
    close(edited @ chosen, torch.zeros(OUT, 1, dtype=torch.float64))
    rest = [i for i in range(N) if i != 1]
    close(edited @ keys[:, rest], values[:, rest])


def test_facts_one_after_the_other_are_facts_at_once() -> None:
    """Earlier keys with residual zero stay where they are; the sum is the joint update."""
    metric, keys, residual = SecondMomentMetric.of(moment(), 0.0), draw(1, N, 3), draw(2, OUT, 3)
    total = torch.zeros(OUT, N, dtype=torch.float64)
    for i in range(3):
        left = torch.zeros(OUT, i + 1, dtype=torch.float64)
        left[:, -1] = (
            residual[:, i] - total @ keys[:, i]
        )  # what the earlier facts have not done to it already
        total += least_squares_update(metric, keys[:, : i + 1], left)
        close(total @ keys[:, : i + 1], residual[:, : i + 1])
    close(total, least_squares_update(metric, keys, residual))


def test_some_neurons_only() -> None:
    """Restricted to columns S the cheapest update is that of C_SS and k_S."""
    neurons = torch.tensor([0, 3, 4, 9])
    full, key, residual = moment(), draw(1, N, 1), draw(2, OUT, 1)
    small = SecondMomentMetric.of(within(full, neurons), 0.0)
    update = torch.zeros(OUT, N, dtype=torch.float64)
    update[:, neurons] = least_squares_update(small, key[neurons], residual)
    close(update @ key, residual)
    assert small.cost(update[:, neurons]) == pytest.approx(float(((update @ full) * update).sum()))


def test_alphaedit_is_the_papers_formula() -> None:
    """R Kᵀ P (K_e K_eᵀ P + K Kᵀ P + l2 I)⁻¹, dense and unsymmetric."""
    full, keys, residual, earlier, l2 = moment(), draw(1, N, 3), draw(2, OUT, 3), draw(3, N, 2), 0.4
    space = NullSpace.of(full, 0.5)
    assert 0 < space.basis.shape[1] < N
    projection = space.basis @ space.basis.mT
    dense = torch.linalg.inv(
        earlier @ earlier.mT @ projection
        + keys @ keys.mT @ projection
        + l2 * torch.eye(N, dtype=torch.float64)
    )
    close(write_within(space, keys, residual, l2, earlier), residual @ keys.mT @ projection @ dense)
    close(write_within(space, keys, residual, l2) @ projection, write_within(space, keys, residual, l2))


def test_null_space_leaves_text_that_fills_the_rest_alone() -> None:
    """Text in 8 of 12 dimensions: an update in the other 4 does nothing to it."""
    text = torch.linalg.qr(draw(0, N, N))[0][:, :8] @ draw(1, 8, 50)
    space = NullSpace.of(text @ text.mT / 50, 1e-6)
    assert space.basis.shape[1] == 4
    assert space.kept < 1e-12
    update = write_within(space, draw(2, N, 3), draw(3, OUT, 3), 0.1)
    close(update @ text, torch.zeros(OUT, 50, dtype=torch.float64))


def test_condition_number_is_near_the_true_one() -> None:
    metric = SecondMomentMetric.of(moment(), 0.01)
    true = float(torch.linalg.cond(metric.matrix))
    assert 0.9 * true < metric.condition <= true * (1 + 1e-9)


def test_what_cannot_be_solved_is_refused() -> None:
    singular = moment(samples=4)
    with pytest.raises(InputError, match="not positive definite"):
        SecondMomentMetric.of(singular, 0.0)
    assert SecondMomentMetric.of(singular, 0.1).condition > 1
    key = draw(1, N, 1)
    with pytest.raises(InputError, match="look the same"):
        least_squares_update(
            SecondMomentMetric.of(moment(), 0.0), torch.cat([key, 2 * key], dim=1), draw(2, OUT, 2)
        )
    with pytest.raises(InputError, match="raise the threshold"):
        NullSpace.of(torch.eye(N, dtype=torch.float64), 0.5)
