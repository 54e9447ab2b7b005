"""Whether the place of an edit mattered: by hand, against simulation, and held to 5 % of false verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from locus.audit.intervals import Items, gain
from locus.audit.place_comparison import P_SHOWN, holm, place_test
from locus.audit.settings import Standards
from locus.errors import InputError

FACTS = 12
FIGURES = ("forget.prob", "held_out.top1", "text.kl", "relearn.prob")


def items(values: np.ndarray) -> Items:
    return Items(tuple(map(str, range(len(values)))), torch.from_numpy(np.asarray(values, float)))


def test_one_case_against_five_by_hand() -> None:
    """Logits 0 against -5 to -3 in halves: t = 4 / (.7906 * sqrt(1.2)) = 4.619 with 4 degrees of freedom."""
    from scipy.stats import t

    controls = [items(1 / (1 + np.exp(-np.full(FACTS, logit - 4.0)))) for logit in (-1, -0.5, 0, 0.5, 1)]
    found = place_test(items(np.full(FACTS, 0.5)), controls)
    assert found.higher and found.n_controls == 5
    assert found.p == pytest.approx(2 * t.sf(4 / (math.sqrt(0.625) * math.sqrt(1.2)), 4), rel=1e-6)
    inside = place_test(items(np.full(FACTS, 1 / (1 + np.exp(4.2)))), controls)
    assert inside.p == 1, "within the controls' range nothing is shown"


def test_two_controls_that_agree_show_nothing_of_how_masks_differ() -> None:
    same = [items(np.full(FACTS, 0.1)), items(np.full(FACTS, 0.1))]
    assert place_test(items(np.full(FACTS, 0.101)), same).p > P_SHOWN
    assert place_test(items(np.full(FACTS, 0.101)), same * 10).p > P_SHOWN, (
        "1 % is no difference between masks"
    )
    assert place_test(items(np.full(FACTS, 0.1)), same[:1]).p == 1


def test_one_fact_more_is_no_difference_where_all_controls_have_all_right() -> None:
    right = [items(np.ones(FACTS)) for _ in range(8)]
    missed = np.ones(FACTS)
    missed[0] = 0
    assert place_test(items(missed), right).p > P_SHOWN
    assert place_test(items(np.arange(FACTS) % 2 == 0), right).p < P_SHOWN


def test_a_broken_edit_is_worse_and_a_broken_control_shows_nothing() -> None:
    whole = [items(np.full(FACTS, 0.1 + 0.01 * i)) for i in range(5)]
    broken = items(np.full(FACTS, math.inf))
    assert place_test(broken, whole, share=False).p == 0
    assert place_test(whole[0], [*whole, broken], share=False).p == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def drawn(rng: np.random.Generator, masks: np.ndarray) -> dict[str, list[Items]]:
    """Four figures of masks that differ by their own logit, on facts that are what they are."""
    found: dict[str, list[Items]] = {}
    for key in FIGURES:
        facts = rng.normal(-2, 2, FACTS)
        own = masks + 0.3 * rng.normal(size=len(masks))
        logits = facts + own[:, None] + 0.5 * rng.normal(size=(len(masks), FACTS))
        probs = 1 / (1 + np.exp(-logits))
        values = {"held_out.top1": rng.random(probs.shape) < probs, "text.kl": np.exp(logits)}.get(key, probs)
        found[key] = [items(one) for one in np.asarray(values, float)]
    return found


@pytest.mark.parametrize("n_controls", [5, 10])
@pytest.mark.parametrize("spread", ["normal", "heavy tails"])
def test_a_random_mask_is_called_better_or_worse_in_less_than_5_percent(n_controls: int, spread: str) -> None:
    """Masks differ by .5 logit, independently of the edit's. Two controls and seven figures gave 67 % before."""
    rng, draws, wrong = np.random.default_rng(0), 600, 0
    for _ in range(draws):
        size = n_controls + 1
        masks = 0.5 * (rng.normal(size=size) if spread == "normal" else rng.standard_t(3, size))
        figures = drawn(rng, masks)
        ps = [place_test(one[0], one[1:], key != "text.kl").p for key, one in figures.items()]
        wrong += min(holm(ps)) < P_SHOWN
    assert wrong / draws <= 0.05


def test_a_place_that_matters_is_found_with_ten_controls() -> None:
    """Three logits beyond masks that differ by a third of a logit: in more than nine of ten."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(100):
        figures = drawn(rng, np.concatenate([[3.0], 0.33 * rng.normal(size=10)]))
        ps = [place_test(one[0], one[1:], key != "text.kl").p for key, one in figures.items()]
        found += min(holm(ps)) < P_SHOWN
    assert found > 90


def test_the_interval_against_controls_knows_how_much_they_differ() -> None:
    edit = items(np.linspace(0.2, 0.3, FACTS))
    alike = [items(np.linspace(0.1, 0.2, FACTS) + 0.001 * i) for i in range(5)]
    apart = [items(np.linspace(0.1, 0.2, FACTS) + 0.1 * (i - 2)) for i in range(5)]
    near, far = gain(edit, alike), gain(edit, apart)
    assert near is not None and far is not None and near.mean == pytest.approx(far.mean, abs=0.01)
    assert far.high - far.low > 2 * (near.high - near.low)


def test_fewer_than_five_controls_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="fewer than 5 show nothing"):
        Standards(min_controls=4)
    with pytest.raises(InputError, match="name at least one figure"):
        Standards(place_figures=())
