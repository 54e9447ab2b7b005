"""Values by hand, limits, and gradients of the objectives other than GA and NPO (which have files of their own)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from editors.objectives.ceu import ceu_loss
from editors.objectives.dpo import dpo_loss
from editors.objectives.ga import ga_loss
from editors.objectives.idk import idk_loss
from editors.objectives.lens_defence import head_projection_loss, lens_layers, max_entropy_loss
from editors.objectives.npo import npo_loss
from editors.objectives.rkld import rkld_loss
from editors.objectives.rmu import rmu_loss
from editors.objectives.satimp import satimp_loss
from editors.objectives.selective_ga import selective_ga_loss
from editors.objectives.simnpo import simnpo_loss
from editors.objectives.undial import undial_loss
from editors.objectives.wga import wga_loss
from editors.objectives.yao import yao_loss
from editors.two_stage.task_vector import negated
from editors.two_stage.whp import generic_logits

NLL = torch.tensor([0.3, 4.0, 2.5], dtype=torch.float64)
REF = torch.tensor([0.5, 1.0, 6.0], dtype=torch.float64)
LENGTHS = torch.tensor([1, 3, 2])
LABELS = torch.tensor([2, 0, 4])


def logits(seed: int, *shape: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (3, 5), generator=source, dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(loss(x).sum(), x)
    return g


@pytest.mark.parametrize(
    ("loss", "at"),
    [
        (lambda x: simnpo_loss(x, LENGTHS, 2.5, 0.4), NLL),
        (lambda x: dpo_loss(REF, REF + 1, x, REF, 0.4), NLL),
        (lambda x: dpo_loss(x, REF, NLL, REF, 0.4), REF + 0.3),
        (lambda x: idk_loss(x, LENGTHS), NLL),
        (lambda x: yao_loss(x, x**2, 0.5, 1.0), NLL),
        (lambda x: selective_ga_loss(x, torch.tensor([1.0, 0.0, 0.5]).double(), 0.3), NLL),
        (lambda x: undial_loss(x, logits(1), LABELS, 10.0), logits(0)),
        (lambda x: rkld_loss(x, logits(1), LABELS, 3.0), logits(0)),
        (lambda x: rmu_loss(x, logits(2, 5), NLL), logits(0)),
        (lambda x: head_projection_loss(x, LABELS, 2, 0.5), logits(0, 2, 3, 7)),
        (max_entropy_loss, logits(0, 2, 3, 7)),
    ],
)
def test_gradients_are_right(loss: Callable[[Tensor], Tensor], at: Tensor) -> None:
    assert torch.autograd.gradcheck(loss, at.clone().requires_grad_(True))


def test_simnpo_by_hand() -> None:
    """beta 1, NLL per token ln 3 and 0 (margin 0): sigmoids 3/4 and 1/2, -2 (ln 3/4 + ln 1/2) / 2 = ln 8/3."""
    nll = torch.tensor([2 * math.log(3), 0.0], dtype=torch.float64)
    assert float(simnpo_loss(nll, torch.tensor([2, 1]), 1.0, 0.0)) == pytest.approx(
        math.log(8 / 3), abs=1e-12
    )


def test_simnpo_is_npo_per_token_with_the_margin_as_reference() -> None:
    margin = torch.full_like(NLL, 0.7)
    torch.testing.assert_close(
        simnpo_loss(NLL, LENGTHS, 2.5, 0.7), npo_loss(NLL / LENGTHS, margin, 2.5), rtol=1e-12, atol=0
    )


def test_simnpo_becomes_ascent_per_token_as_beta_vanishes() -> None:
    small = gradient(lambda x: simnpo_loss(x, LENGTHS, 1e-8, 0.0), NLL)
    torch.testing.assert_close(small, gradient(lambda x: ga_loss(x / LENGTHS), NLL), rtol=1e-6, atol=0)


def test_dpo_by_hand() -> None:
    """beta 2: margin (ln 2 - 0) - (0 - ln 2 / 2) = 1.5 ln 2, so -log sigmoid(3 ln 2) = ln(9/8)."""
    half, zero = torch.tensor([math.log(2) / 2], dtype=torch.float64), torch.zeros(1).double()
    value = dpo_loss(zero, half, 2 * half, zero, 2.0)
    assert float(value) == pytest.approx(math.log(9 / 8), abs=1e-12)


def test_dpo_is_npo_when_the_preferred_answer_stays() -> None:
    torch.testing.assert_close(dpo_loss(REF, REF, NLL, REF, 0.3), npo_loss(NLL, REF, 0.3), rtol=0, atol=0)


def test_dpo_becomes_descent_on_one_and_ascent_on_the_other_as_beta_vanishes() -> None:
    assert gradient(lambda x: dpo_loss(x, REF, NLL, REF, 1e-8), REF).tolist() == pytest.approx([1 / 3] * 3)
    assert gradient(lambda x: dpo_loss(REF, REF, x, REF, 1e-8), NLL).tolist() == pytest.approx([-1 / 3] * 3)


def test_idk_is_cross_entropy_per_token() -> None:
    assert float(idk_loss(torch.tensor([3.0, 4.0]), torch.tensor([3, 2]))) == 1.5


def test_yao_by_hand_and_its_limit() -> None:
    """0.5 * -(1 + 3) / 2 + 1 * (2 + 6) / 2 = 3."""
    assert float(yao_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0]), 0.5, 1.0)) == 3.0
    assert torch.equal(yao_loss(NLL, REF, 1.0, 0.0), ga_loss(NLL))


def test_selective_ascent_leaves_alone_what_is_not_memorized() -> None:
    memorized = torch.tensor([1.0, 0.2, 0.5], dtype=torch.float64)
    assert gradient(lambda x: selective_ga_loss(x, memorized, 0.5), NLL).tolist() == pytest.approx(
        [-1 / 3, 0, 0]
    )
    assert torch.equal(selective_ga_loss(NLL, memorized, -1.0), ga_loss(NLL))
    assert float(selective_ga_loss(NLL, memorized, 1.0)) == 0.0


def test_wga_by_hand() -> None:
    """p = 1/2, beta 2: -(1/4) ln 2, and the weight carries no gradient: -1/4."""
    nll = torch.tensor([math.log(2)], dtype=torch.float64)
    assert float(wga_loss(nll, 2.0)) == pytest.approx(-math.log(2) / 4)
    assert float(gradient(lambda x: wga_loss(x, 2.0), nll)) == pytest.approx(-0.25)
    assert torch.equal(wga_loss(NLL, 0.0), -NLL)


def test_satimp_by_hand() -> None:
    """p = 1/4, beta1 1, beta2 2: -(1/4) (9/16) ln 4, gradient -9/64."""
    nll = torch.tensor([math.log(4)], dtype=torch.float64)
    assert float(satimp_loss(nll, 1.0, 2.0)) == pytest.approx(-9 / 64 * math.log(4))
    assert float(gradient(lambda x: satimp_loss(x, 1.0, 2.0), nll)) == pytest.approx(-9 / 64)
    torch.testing.assert_close(satimp_loss(NLL, 1.3, 0.0), wga_loss(NLL, 1.3), rtol=0, atol=0)
    assert torch.equal(satimp_loss(NLL, 0.0, 0.0), -NLL)
    certain = torch.tensor([0.0, 800.0], dtype=torch.float64)
    assert gradient(lambda x: satimp_loss(x, 1.0, 1.0), certain).abs().max() == 0


def test_ceu_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), target the first: q = (0, 1/2, 1/2), CE = ln 4, gradient p - q."""
    z = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    label = torch.tensor([0])
    assert float(ceu_loss(z, label)) == pytest.approx(math.log(4), abs=1e-12)
    expected = torch.tensor([[0.5, -0.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda x: ceu_loss(x, label), z), expected, rtol=0, atol=1e-12)


def test_ceu_vanishes_with_the_targets_probability() -> None:
    z = logits(0)
    z[torch.arange(3), LABELS] = -60.0
    assert gradient(lambda x: ceu_loss(x, LABELS), z).abs().max() < 1e-15


def test_undial_by_hand() -> None:
    """Reference (1/2, 1/2), beta ln 3 on the first: teacher (1/4, 3/4); edited (1/2, 1/2): CE = ln 2."""
    ref = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    label = torch.tensor([0])
    assert float(undial_loss(ref, ref, label, math.log(3))) == pytest.approx(math.log(2), abs=1e-12)
    expected = torch.tensor([[0.25, -0.25]], dtype=torch.float64)  # p - teacher
    grad = gradient(lambda x: undial_loss(x, ref, label, math.log(3)), ref)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_distillations_rest_at_their_teacher() -> None:
    ref = logits(1)
    assert gradient(lambda x: undial_loss(x, ref, LABELS, 0.0), ref).abs().max() < 1e-12
    assert gradient(lambda x: rkld_loss(x, ref, LABELS, 0.0), ref).abs().max() < 1e-12
    lowered = ref.clone()
    lowered[torch.arange(3), LABELS] -= 4.0
    assert rkld_loss(lowered, ref, LABELS, 4.0).abs().max() < 1e-12


def test_rkld_by_hand() -> None:
    """Edited (1/2, 1/2), teacher (1/4, 3/4): (ln 2 + ln 2/3) / 2 = ln(4/3) / 2."""
    ref = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    value = rkld_loss(ref, ref, torch.tensor([0]), math.log(3))
    assert float(value) == pytest.approx(math.log(4 / 3) / 2, abs=1e-12)


def test_rmu_by_hand() -> None:
    """State (1, 2), goal 5 * (0.6, 0.8) = (3, 4): (4 + 4) / 2."""
    value = rmu_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([0.6, 0.8]), torch.tensor([5.0]))
    assert float(value) == pytest.approx(4.0)


def test_head_projection_by_hand() -> None:
    """Others 5 4 3 2 1, k = 2: the target must lie between 2 and 4. At 4.5 with margin 1: 1.5, at 3: 0."""
    others = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    label = torch.tensor([5])

    def value(target: float, margin: float) -> float:
        return float(
            head_projection_loss(torch.cat([others, torch.tensor([target])])[None, None], label, 2, margin)
        )

    assert value(4.5, 1.0) == pytest.approx(1.5)
    assert value(3.0, 1.0) == 0.0
    assert value(1.5, 1.0) == pytest.approx(1.5)
    assert value(9.0, 0.0) == pytest.approx(5.0)


def test_max_entropy_is_least_at_the_uniform_distribution() -> None:
    uniform = torch.zeros(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(max_entropy_loss(uniform), torch.full((3,), -math.log(8)).double())
    assert gradient(max_entropy_loss, uniform).abs().max() < 1e-12
    assert (max_entropy_loss(logits(0, 2, 3, 8)) > -math.log(8)).all()


def test_lens_layers_are_the_upper_half_unless_named() -> None:
    assert lens_layers((), 5) == [2, 3, 4]
    assert lens_layers((0, -1), 5) == [0, 4]


def test_generic_logits_by_hand() -> None:
    """Raised by 2 with alpha 5: lowered by 10; lowered by reinforcement: untouched."""
    base, reinforced = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -4.0]])
    assert generic_logits(base, reinforced, 5.0).tolist() == [[-9.0, 1.0]]
    assert torch.equal(generic_logits(base, reinforced, 0.0), base)


def test_task_vector_limits() -> None:
    old, learnt = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 0.0])
    assert negated(old, learnt, 2.0).tolist() == [0.0, 6.0]
    assert torch.equal(negated(old, learnt, 0.0), old)
    assert torch.equal(negated(old, learnt, -1.0), learnt)


def test_losses_of_an_independent_implementation_agree() -> None:
    """Token-level losses against plain formulas over probabilities, to 1e-6."""
    z, ref = logits(0), logits(1)
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    one_hot = F.one_hot(LABELS, 5).double()
    q = p * (1 - one_hot) / (p * (1 - one_hot)).sum(-1, keepdim=True)
    torch.testing.assert_close(ceu_loss(z, LABELS), -(q * p.log()).sum(-1), rtol=1e-6, atol=0)
    teacher = (ref - 3 * one_hot).exp() / (ref - 3 * one_hot).exp().sum(-1, keepdim=True)
    torch.testing.assert_close(
        undial_loss(z, ref, LABELS, 3.0), -(teacher * p.log()).sum(-1), rtol=1e-6, atol=0
    )
    expected = (p * (p / teacher).log()).sum(-1)
    torch.testing.assert_close(rkld_loss(z, ref, LABELS, 3.0), expected, rtol=1e-6, atol=0)
