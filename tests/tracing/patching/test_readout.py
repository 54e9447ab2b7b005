"""Metrics of two made-up sets of logits, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tracing.patching.readout import Readout

# Two target tokens (1, then 0) over a vocabulary of 3; the distributions are (1, 2, 1) / 4 and (8, 1, 1) / 10.
LOGITS = torch.tensor([[[0.0, math.log(2), 0.0], [math.log(8), 0.0, 0.0]]])
LABELS = torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("prob", 0.5 * 0.8),
        ("first_prob", 0.5),
        ("logprob", math.log(0.4)),
        ("logit_diff", math.log(2)),  # the foil's logit is 0
        ("kl", -(0.25 * math.log(0.25 / 0.5) * 1 + 0.5 * math.log(0.5 / 0.25) + 0)),
        ("rank", 0.0),
    ],
)
def test_each_metric(metric: str, value: float) -> None:
    """The clean run's first distribution is (1/4, 1/2, 1/4) against a patched (1/2, 1/4, 1/4) for kl."""
    logits = LOGITS.clone()
    if metric == "kl":
        logits = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).log()
    readout = Readout(metric, LABELS, foil=2, clean_logits=torch.tensor([0.25, 0.5, 0.25]).log())  # type: ignore[arg-type]
    assert float(readout(logits)[0, 0]) == pytest.approx(value, abs=1e-6)


def test_the_whole_targets_probability_stands_beside_every_metric() -> None:
    assert float(Readout("rank", LABELS)(LOGITS.clone())[0, 1]) == pytest.approx(0.4)


def test_rank_counts_the_tokens_above() -> None:
    logits = torch.tensor([[[3.0, 2.0, 5.0]], [[1.0, 2.0, 0.0]]])
    assert Readout("rank", torch.tensor([1]))(logits)[:, 0].tolist() == [-2.0, 0.0]


def test_large_logits_lose_no_precision() -> None:
    """Shifting all logits by 1000 changes nothing but their rounding."""
    logits = torch.tensor([[[1000.0, 1002.0, 1001.0]]])
    expected = math.exp(2) / (1 + math.exp(2) + math.exp(1))
    assert float(Readout("prob", torch.tensor([1]))(logits)[0, 0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_what_a_metric_needs_it_asks_for(metric: str) -> None:
    with pytest.raises(ValueError, match="needs"):
        Readout(metric, LABELS)(LOGITS)  # type: ignore[arg-type]
