"""Each metric against numbers worked out by hand, an independent slow version, or the package that defines it."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locus import metrics


def test_probability_of_a_two_token_target_is_the_product_and_per_token_its_root() -> None:
    nll = torch.tensor([-math.log(0.5 * 0.08)])
    assert metrics.probability(nll).item() == pytest.approx(0.04)
    assert metrics.probability_per_token(nll, torch.tensor([2])).item() == pytest.approx(0.2)


def test_probability_among_options_shares_the_per_token_probabilities() -> None:
    """Right 0.6 over one token, wrong sqrt(0.04) = 0.2 over two: 0.6 / 0.8."""
    nll = torch.tensor([[-math.log(0.6), -math.log(0.04)]])
    assert metrics.probability_among(nll, torch.tensor([[1, 2]])).item() == pytest.approx(0.75)


def test_multiple_choice_by_token_and_as_a_whole_can_disagree_and_a_tie_is_wrong() -> None:
    nll, n = torch.tensor([[1.0, 1.5], [1.0, 1.0]]), torch.tensor([[1, 3], [1, 1]])
    answer = torch.tensor([0, 0])
    assert metrics.multiple_choice_right(nll, n, answer, per_token=True).tolist() == [False, False]
    assert metrics.multiple_choice_right(nll, n, answer, per_token=False).tolist() == [True, False]


def test_perplexity_of_a_fair_coin_is_two() -> None:
    assert metrics.perplexity(torch.full((7,), math.log(2))) == pytest.approx(2)
    assert math.isfinite(metrics.perplexity(torch.tensor([math.inf])))
    with pytest.raises(ValueError, match="no tokens"):
        metrics.perplexity(torch.tensor([]))


def test_kl_is_that_of_torch_and_has_the_base_on_the_left() -> None:
    base, edited = torch.randn(2, 5, 9).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=base), torch.distributions.Categorical(logits=edited)
    )
    torch.testing.assert_close(metrics.kl_divergence(base, edited), expected, atol=1e-6, rtol=1e-5)


def test_kl_by_hand() -> None:
    """Reference (1/2, 1/2), edited (1/4, 3/4): (ln 2 + ln 2/3) / 2 = ln(4/3) / 2; the second position agrees."""
    ref = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double().log()
    edited = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).double().log() + 3.0  # logits know no constant
    expected = torch.tensor([math.log(4 / 3) / 2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(metrics.kl_divergence(ref, edited), expected, rtol=0, atol=1e-12)
    assert metrics.kl_divergence(ref[:0], edited[:0]).shape == (0,)


def test_kl_gradient_is_right_on_both_sides() -> None:
    source = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 5, generator=source, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(metrics.kl_divergence, (p, q))
    assert torch.autograd.gradcheck(lambda x: metrics.kl_divergence(p.detach(), x), q)
    assert torch.autograd.gradcheck(lambda x: metrics.kl_divergence(x, q.detach()), p)


def test_kl_of_many_positions_is_the_plain_formulas_in_value_and_gradient() -> None:
    """Seventy positions, more than are held at once."""
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(70, 9, generator=source, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(70, 9, generator=source, dtype=torch.float64)
    weights = torch.randn(70, generator=source, dtype=torch.float64)
    log_ref = ref.log_softmax(-1)
    plain = (log_ref.exp() * (log_ref - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(metrics.kl_divergence(ref, logits), plain, rtol=1e-12, atol=0)
    expected = torch.autograd.grad((plain * weights).sum(), logits)
    torch.testing.assert_close(
        torch.autograd.grad((metrics.kl_divergence(ref, logits) * weights).sum(), logits), expected
    )


def test_the_only_kl_and_nll_are_here() -> None:
    """No other file of the packages writes the sum of a KL, or calls cross_entropy with labels that are tokens."""
    root = Path(metrics.__file__).parents[1]
    kl = re.compile(r"\.exp\(\) \* \((\w+) - .*log_softmax|(\w+)\.exp\(\) \* \(\2 - ")
    found = {
        str(path.relative_to(root))
        for package in ("locus", "tracing", "editors")
        for path in (root / package).rglob("*.py")
        if kl.search(text := path.read_text("utf-8")) or "cross_entropy(" in text
    }
    soft = {"editors/objectives/ceu.py", "editors/objectives/undial.py"}  # cross-entropy to a distribution
    shared = {"locus/lens.py"}  # whose log-probabilities serve four more columns of the same table
    assert found - soft - shared == {"locus/metrics.py"}


@pytest.mark.parametrize(
    ("correct", "ours", "theirs"),
    [
        ([True, True, True, True], 1.0, 1.0),
        ([True, False, True, True], 0.5, 0.5),
        ([False, True, False, True], 0.25, 0.25),
        ([True, True, True, False], 0.0, 0.25),
        ([False], 0.0, 1.0),
    ],
)
def test_extraction_strength_counts_the_suffix_and_only_openunlearning_never_says_zero(
    correct: list[bool], ours: float, theirs: float
) -> None:
    flags = torch.tensor(correct)
    assert metrics.extraction_strength(flags) == ours
    assert metrics.extraction_strength(flags, "openunlearning") == theirs


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_extraction_strength_is_that_of_the_definition(correct: list[bool]) -> None:
    n = len(correct)
    shortest = next(k for k in range(n + 1) if all(correct[k:]))
    assert metrics.extraction_strength(torch.tensor(correct)) == pytest.approx(1 - shortest / n)
    assert metrics.exact_memorization(torch.tensor(correct)) == pytest.approx(sum(correct) / n)


def test_rouge_stems_and_measures_the_longest_common_subsequence() -> None:
    """ "the cat sat" and "a cat sat" share "cat sat" after stemming: recall 2/5, precision 2/3."""
    assert metrics.rouge_l("the cats sat on mats", "a cat sat") == pytest.approx((0.4, 0.5))
    assert metrics.rouge_l("the cat", "") == (0.0, 0.0)


def _lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + _lcs(a[1:], b[1:])
    return max(_lcs(a[1:], b), _lcs(a, b[1:]))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("xyz"), min_size=1, max_size=6),
    st.lists(st.sampled_from("xyz"), min_size=1, max_size=6),
)
def test_rouge_is_that_of_the_recursive_definition(reference: list[str], candidate: list[str]) -> None:
    common = _lcs(reference, candidate)
    recall, f = metrics.rouge_l(" ".join(reference), " ".join(candidate))
    assert recall == pytest.approx(common / len(reference))
    assert f == pytest.approx(2 * common / (len(reference) + len(candidate)))


def test_truth_ratio_modes() -> None:
    """Right answer p 0.5; wrong ones 0.4 and 0.1: geometric mean 0.2, arithmetic 0.25."""
    right = torch.tensor([-math.log(0.5)])
    wrong = torch.tensor([[-math.log(0.4), -math.log(0.1)]])
    ratios = {mode: metrics.truth_ratio(right, wrong, mode).item() for mode in metrics.TRUTH_RATIO_MODES}
    assert ratios == pytest.approx(
        {"locus": 0.4, "tofu-original": 2.5, "openunlearning": 0.4, "tofu-paper": 0.5}
    )
    for mode in ("locus", "tofu-original", "openunlearning"):
        ratio = metrics.truth_ratio(right, wrong, mode)
        assert metrics.truth_ratio_score(ratio, True, mode).item() == pytest.approx(0.4)
        assert metrics.truth_ratio_score(ratio, False, mode).item() == pytest.approx(0.6)


def test_truth_ratio_of_a_wrong_answer_that_is_likelier_scores_nothing_on_retained_facts() -> None:
    ratio = torch.tensor([4.0])
    assert metrics.truth_ratio_score(ratio, False).item() == 0
    assert metrics.truth_ratio_score(ratio, True).item() == 0.25


def test_forget_quality_is_scipys_ks_and_does_not_depend_on_the_mode() -> None:
    from scipy.stats import ks_2samp

    ours, theirs = torch.rand(40) + 0.1, torch.rand(30) + 0.3
    expected = ks_2samp(ours.numpy(), theirs.numpy()).pvalue
    assert metrics.forget_quality(ours, theirs) == pytest.approx(expected)
    assert metrics.forget_quality(1 / ours, 1 / theirs) == pytest.approx(expected)
    assert metrics.forget_quality(ours, ours) == pytest.approx(1)


def test_ks_by_hand() -> None:
    """Two samples of 3 that do not overlap: D = 1, p = 2 / C(6, 3) = 0.1."""
    assert metrics.forget_quality(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    ) == pytest.approx(0.1)


def test_model_utility_is_the_harmonic_mean_of_nine() -> None:
    nine = {str(i): 0.5 for i in range(8)} | {"last": 0.25}
    assert metrics.model_utility(nine) == pytest.approx(9 / (8 * 2 + 4))
    assert metrics.model_utility(nine | {"last": 0.0}) == 0
    with pytest.raises(ValueError, match="nine"):
        metrics.model_utility({"one": 0.5})


def test_membership_scores_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -4.0, -2.0, -3.0, -5.0])
    text = "abcab"
    assert metrics.loss_score(logprobs) == pytest.approx(-3)
    assert metrics.zlib_score(logprobs, text) == pytest.approx(-15 / len(zlib.compress(text.encode())))
    assert metrics.min_k(logprobs, 0.4) == pytest.approx(-4.5)
    assert metrics.min_k(logprobs, 0.01) == -5
    assert metrics.reference_score(logprobs, torch.full((5,), -4.0)) == pytest.approx(1)
    with pytest.raises(ValueError, match="fraction"):
        metrics.min_k(logprobs, 0.0)


def test_min_k_plus_plus_standardizes_by_the_distribution_itself() -> None:
    """p = (3/4, 1/4): mean of log p and its variance under p, then z of the label 1/4."""
    p = torch.tensor([[0.75, 0.25]])
    mean = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    variance = 0.75 * math.log(0.75) ** 2 + 0.25 * math.log(0.25) ** 2 - mean**2
    z = metrics.standardized_logprobs(p.log(), torch.tensor([1])).item()
    assert z == pytest.approx((math.log(0.25) - mean) / math.sqrt(variance), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5).map(float), min_size=1, max_size=8),
    st.lists(st.integers(0, 5).map(float), min_size=1, max_size=8),
)
def test_auc_is_the_share_of_pairs_won(positive: list[int], negative: list[int]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert metrics.auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))


def test_privleak_is_negative_while_the_forget_texts_still_look_like_members() -> None:
    known = metrics.privacy_auc(forget=[-1.0, -1.2], holdout=[-3.0, -2.0])
    assert known == 0
    assert metrics.privleak(known, 0.5) == -100
    assert metrics.privleak(0.5, 0.5) == 0
    assert metrics.privleak(1.0, 0.5) == 100
    with pytest.raises(ValueError, match="positive"):
        metrics.privleak(0.5, 0.0)


def test_rounding_by_hand() -> None:
    """4 bits: -7 to 7 steps of max/7. Row (7, 3.4, -0.6, 0) has step 1; an empty row stays empty."""
    weight = torch.tensor([[7.0, 3.4, -0.6, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[7.0, 3.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(metrics.round_to_nearest(weight, 4), expected)
    pairs = metrics.round_to_nearest(torch.tensor([[7.0, 3.4, -0.7, 0.04]]), 4, group=2)
    torch.testing.assert_close(pairs, torch.tensor([[7.0, 3.0, -0.7, 0.0]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 7))
def test_rounding_twice_is_rounding_once_and_never_off_by_more_than_half_a_step(
    bits: int, group: int
) -> None:
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(bits * 10 + group))
    once = metrics.round_to_nearest(weight, bits, group)
    torch.testing.assert_close(metrics.round_to_nearest(once, bits, group), once)
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    assert (weight - once).abs().max() <= step / 2 + 1e-6
