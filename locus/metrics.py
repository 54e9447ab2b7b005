"""What an edit is judged by: pure functions on tensors, one definition each.

Probabilities are in [0, 1], likelihoods in nats. Where public code computes the same name in another way,
the variants are listed in `TRUTH_RATIO_MODES` and `EXTRACTION_MODES` under the name of that code, and
nothing is silently one of them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TruthRatioMode = Literal["locus", "tofu-original", "openunlearning", "tofu-paper"]
TRUTH_RATIO_MODES: tuple[TruthRatioMode, ...] = ("locus", "tofu-original", "openunlearning", "tofu-paper")
ExtractionMode = Literal["locus", "openunlearning"]
EXTRACTION_MODES: tuple[ExtractionMode, ...] = ("locus", "openunlearning")

_TINY = 1e-10  # the constant that OpenUnlearning adds to its denominators


# Likelihood ---------------------------------------------------------------------------------------


def token_nll(
    logits: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Negative log-likelihood of each label in nats, -log softmax(logits)[label]; differentiable."""
    return F.cross_entropy(logits, labels.to(logits.device), reduction="none")


def probability(nll: Float[Tensor, " example"]) -> Float[Tensor, " example"]:
    """Probability of the whole target, exp(-NLL)."""
    return torch.exp(-nll)


def probability_per_token(
    nll: Float[Tensor, " example"], n_tokens: Int[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Geometric mean of the target tokens' probabilities, exp(-NLL / T): TOFU's "probability".

    TOFU's own T counts the end of the answer; here it does in conversation, where the target ends with its turn.
    """
    return torch.exp(-nll / n_tokens)


def probability_among(
    nll: Float[Tensor, "example option"], n_tokens: Int[Tensor, "example option"], answer: int = 0
) -> Float[Tensor, " example"]:
    """Share of one option in the options' summed per-token probabilities.

    TOFU's "probability" on its real-authors and world-facts sets (Maini et al. 2024, arXiv:2401.06121).
    """
    probs = torch.exp(-nll / n_tokens)
    return probs[:, answer] / probs.sum(1)


def multiple_choice_right(
    nll: Float[Tensor, "example option"],
    n_tokens: Int[Tensor, "example option"],
    answer: Int[Tensor, " example"],
    per_token: bool = True,
) -> Bool[Tensor, " example"]:
    """Whether the right option is the likeliest one; a tie is wrong.

    Args:
        nll: NLL of each option, summed over its tokens, in nats.
        n_tokens: Tokens of each option.
        answer: Number of the right option.
        per_token: Compare NLL per token (length-normalised) instead of per option.
    """
    scores = nll / n_tokens if per_token else nll
    right = scores.gather(1, answer[:, None])
    return (scores <= right).sum(1) == 1


def perplexity(nll: Float[Tensor, " token"]) -> float:
    """exp of the mean negative log-likelihood of the tokens.

    Raises:
        ValueError: there is no token.
    """
    if nll.numel() == 0:
        raise ValueError("perplexity of no tokens")
    return math.exp(min(nll.double().mean().item(), 700.0))


def kl_divergence(
    p_logits: Float[Tensor, "token d_vocab"], q_logits: Float[Tensor, "token d_vocab"]
) -> Float[Tensor, " token"]:
    """KL(p || q) of two next-token distributions at each position, in nats; 0 where they are equal.

    KL(reference || edited) is the retain term of TOFU's KL-min (Maini et al. 2024, arXiv:2401.06121) and of NPO + KL
    (Zhang et al. 2024, arXiv:2404.05868). A few positions are computed at a time: one tensor of the logits' size is
    made, not six.

    Args:
        p_logits: Logits or log-probabilities of p. Their gradient is p * (log p - log q - KL).
        q_logits: Logits or log-probabilities of q. Their gradient is q - p.
    """
    values: Tensor = _KL.apply(p_logits, q_logits)  # type: ignore[no-untyped-call]
    return values


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        ctx.save_for_backward(p_logits, q_logits)
        values = []
        for p, q in zip(p_logits.split(_POSITIONS), q_logits.split(_POSITIONS), strict=True):
            log_p = p.log_softmax(-1)
            values.append((log_p.exp() * (log_p - q.log_softmax(-1))).sum(-1))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p_logits, q_logits = ctx.saved_tensors
        to_p, to_q = (
            torch.empty_like(logits) if needed else None
            for logits, needed in zip((p_logits, q_logits), ctx.needs_input_grad, strict=True)
        )
        for start in range(0, len(q_logits), _POSITIONS):
            rows = slice(start, start + _POSITIONS)
            slope = slopes[0][rows, None]
            if to_q is not None:
                apart = q_logits[rows].softmax(-1).sub_(p_logits[rows].softmax(-1))
                torch.mul(apart, slope, out=to_q[rows])
            if to_p is not None:
                log_p = p_logits[rows].log_softmax(-1)
                ratio = log_p - q_logits[rows].log_softmax(-1)
                p = log_p.exp_()
                torch.mul(p * (ratio - (p * ratio).sum(-1, keepdim=True)), slope, out=to_p[rows])
        return to_p, to_q


_POSITIONS = 32
"""Positions whose distributions are held at once."""


# Memorization -------------------------------------------------------------------------------------


def exact_memorization(correct: Bool[Tensor, " token"]) -> float:
    """Share of the target's tokens that greedy decoding, teacher-forced, gets right."""
    if correct.numel() == 0:
        raise ValueError("exact memorization of a target without tokens")
    return correct.double().mean().item()


def extraction_strength(correct: Bool[Tensor, " token"], mode: ExtractionMode = "locus") -> float:
    """1 - k/T, with k the shortest prefix after which the whole remaining suffix is predicted exactly.

    Carlini et al. 2021 (arXiv:2012.07805). `correct` says for each target token whether greedy,
    teacher-forced decoding gives it. 0 where not even the last token is right; the mode "openunlearning"
    gives 1/T there, as that code's loop stops one short.
    """
    n = correct.numel()
    if n == 0:
        raise ValueError("extraction strength of a target without tokens")
    wrong = (~correct).nonzero()
    prefix = 0 if wrong.numel() == 0 else int(wrong[-1]) + 1
    if mode == "openunlearning":
        prefix = min(prefix, n - 1)
    return 1 - prefix / n


def rouge_l(reference: str, candidate: str) -> tuple[float, float]:
    """ROUGE-L (recall, F-measure) of a generation against its reference, words stemmed (Lin 2004).

    Computed by the rouge-score package, so that figures equal those of TOFU and MUSE.

    Raises:
        ModuleNotFoundError: rouge-score is not installed (`pip install locus-unlearn[rouge]`).
    """
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], use_stemmer=True).score(reference, candidate)["rougeL"]
    return float(score.recall), float(score.fmeasure)


# TOFU (Maini et al. 2024, arXiv:2401.06121) -------------------------------------------------------


def truth_ratio(
    paraphrased: Float[Tensor, " example"],
    perturbed: Float[Tensor, "example wrong"],
    mode: TruthRatioMode = "locus",
) -> Float[Tensor, " example"]:
    """How likely the wrong answers are beside the right one, per question.

    Args:
        paraphrased: NLL per token of the paraphrased right answer.
        perturbed: NLL per token of each wrong answer.
        mode: "locus": geometric mean of the wrong answers' probabilities over the right one's; 1 when
            the model cannot tell, near 0 when it knows. "tofu-original": its inverse, as TOFU's code
            stores it. "openunlearning": ours with 1e-10 added to the denominator. "tofu-paper": the
            paper's formula, an arithmetic mean of the wrong answers.

    Returns:
        The ratio of each question, not aggregated.
    """
    right = torch.exp(-paraphrased)
    if mode == "tofu-paper":
        return torch.exp(-perturbed).mean(1) / right
    if mode == "openunlearning":
        return torch.exp(-perturbed.mean(1)) / (right + _TINY)
    log_ratio = paraphrased - perturbed.mean(1)
    return torch.exp(-log_ratio if mode == "tofu-original" else log_ratio)


def truth_ratio_score(
    ratio: Float[Tensor, " example"], forget: bool, mode: TruthRatioMode = "locus"
) -> Float[Tensor, " example"]:
    """The truth ratio as a score in [0, 1] that is better when higher.

    On forget questions min(r, 1/r): 1 when right and wrong answers are equally likely. On all others
    max(0, 1 - r): 1 when the right answer is far likelier.
    """
    if mode == "tofu-original":
        ratio = 1 / ratio
    if forget:
        return torch.minimum(ratio, 1 / (ratio + _TINY if mode == "openunlearning" else ratio))
    return (1 - ratio).clamp_min(0)


def forget_quality(ratio: Float[Tensor, " example"], retrained: Float[Tensor, " other"]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between two models' truth ratios.

    Near 1: the edited model cannot be told from one retrained without the forget set. Any monotone
    transform of the ratios gives the same value, so every truth-ratio mode with a geometric mean agrees.
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(ratio.double().numpy(), retrained.double().numpy()).pvalue)


def model_utility(scores: Mapping[str, float]) -> float:
    """Harmonic mean of TOFU's nine scores; 0 when one of them is 0.

    Raises:
        ValueError: not exactly nine scores, or a negative one.
    """
    values = list(scores.values())
    if len(values) != 9 or min(values) < 0:
        raise ValueError(f"model utility takes nine scores of at least 0, got {dict(scores)}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


# Membership inference: every score is higher for what the model has probably seen -----------------


def loss_score(logprobs: Float[Tensor, " token"]) -> float:
    """Mean log-probability of the text's tokens (Yeom et al. 2018, arXiv:1709.01604)."""
    return logprobs.double().mean().item()


def zlib_score(logprobs: Float[Tensor, " token"], text: str) -> float:
    """Log-likelihood of the text over its zlib-compressed size in bytes (Carlini et al. 2021, arXiv:2012.07805)."""
    return logprobs.double().sum().item() / len(zlib.compress(text.encode()))


def min_k(values: Float[Tensor, " token"], fraction: float) -> float:
    """Mean of the lowest `fraction` of the values, at least one (Min-k % Prob, Shi et al. 2024, arXiv:2310.16789).

    On log-probabilities this is Min-k %; on `standardized_logprobs` it is Min-k %++.

    Raises:
        ValueError: the fraction is not in (0, 1], or there are no values.
    """
    if not 0 < fraction <= 1 or values.numel() == 0:
        raise ValueError(
            f"min-k of {values.numel()} values at fraction {fraction}: needs values, and 0 < fraction <= 1"
        )
    n = max(1, int(values.numel() * fraction))
    return values.double().sort().values[:n].mean().item()


def standardized_logprobs(
    logprobs: Float[Tensor, "token d_vocab"], labels: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """Each label's log-probability, centred and scaled by its distribution's own mean and standard deviation.

    Min-k %++ (Zhang et al. 2024, arXiv:2404.02936): mean and variance of log p under p.
    """
    probs = logprobs.exp()
    mean = (probs * logprobs).sum(-1)
    variance = (probs * logprobs.square()).sum(-1) - mean.square()
    return (logprobs.gather(-1, labels[:, None])[:, 0] - mean) / variance.clamp_min(1e-6).sqrt()


def reference_score(logprobs: Float[Tensor, " token"], reference: Float[Tensor, " token"]) -> float:
    """How much likelier the text is, per token, than under a reference (Carlini et al. 2021, arXiv:2012.07805)."""
    return (logprobs.double() - reference.double()).mean().item()


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half.

    Raises:
        ValueError: one of the sides is empty.
    """
    from scipy.stats import rankdata

    if not positive or not negative:
        raise ValueError(f"AUC of {len(positive)} positives and {len(negative)} negatives: needs both")
    ranks = rankdata([*positive, *negative])[: len(positive)].sum()
    n = len(positive)
    return float((ranks - n * (n + 1) / 2) / (n * len(negative)))


# MUSE (Shi et al. 2024, arXiv:2407.06460) ---------------------------------------------------------


def privacy_auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """MUSE's AUC: the probability that a held-out text looks more like a member than a forget text does.

    Arguments are Min-k % scores, higher for members. About 0.5 after retraining, near 0 while the forget
    texts are still known.
    """
    return auc(holdout, forget)


def privleak(value: float, retrained: float) -> float:
    """100 * (AUC - AUC_retrained) / AUC_retrained.

    0 is ideal, negative is unlearned too little, positive too much. Without a retrained model there is
    no such number.

    Raises:
        ValueError: the retrained AUC is not positive.
    """
    if retrained <= 0:
        raise ValueError(f"the retrained model's AUC must be positive, got {retrained}")
    return 100 * (value - retrained) / retrained


# Rounding -----------------------------------------------------------------------------------------


def round_to_nearest(
    weight: Float[Tensor, "out in"], bits: int, group: int | None = None
) -> Float[Tensor, "out in"]:
    """Symmetric round-to-nearest of a matrix to `bits` bits, one scale a row, or one for `group` entries of a row.

    Plain RTN, as int8 and int4 loaders without calibration do; values come back in the weight's dtype.
    A row whose length the group does not divide keeps one shorter group at its end.

    Raises:
        ValueError: fewer than 2 bits, or an empty group.
    """
    if bits < 2 or (group is not None and group < 1):
        raise ValueError(f"cannot round to {bits} bits in groups of {group}")
    step = weight.shape[1] if group is None else group
    parts = []
    for part in weight.float().split(step, dim=1):
        scale = part.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        parts.append((part / scale).round() * scale)
    return torch.cat(parts, dim=1).to(weight.dtype)
