"""Verdicts from made-up figures: what counts against an edit, and what a model that never knew excuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from locus.audit.document import headline
from locus.audit.figure_values import Curve
from locus.audit.intervals import Items
from locus.audit.measurement import LensLeak, Measurement, Relearning
from locus.audit.questions import Answers
from locus.audit.settings import Standards
from locus.audit.verdicts.judgement import judge, left
from locus.audit.verdicts.resistance import returned

FACTS = tuple(f"fact {i}" for i in range(16))


def _answers(prob: float, right: int) -> Answers:
    return Answers(
        FACTS,
        -torch.full((16,), prob).log(),
        torch.ones(16, dtype=torch.long),
        torch.arange(16) < right,
    )


def _state(role: str, prob: float, right: int, paraphrases: int | None = None, **extra: Items) -> Measurement:
    answers = {"forget": _answers(prob, right)}
    if paraphrases is not None:
        answers["paraphrase"] = _answers(prob, paraphrases)
    return Measurement(role, role, answers, extra=extra)  # type: ignore[arg-type]


def _share(n: int) -> Items:
    return Items(FACTS, (torch.arange(16) < n).float())


def _said(edit: Measurement, base: Measurement, never: Measurement | None = None) -> dict[str, str]:
    return {v.question: v.answer for v in judge(edit, base, (), Standards(), never)}


BASE = _state("base", 0.8, 16, 15)


def test_what_is_left_is_counted_above_guessing() -> None:
    """The base 0.8, guessing 0.3, the edit 0.4: a fifth of what was known is left."""
    edit, base = _answers(0.4, 0).prob, _answers(0.8, 0).prob
    assert left(edit, base, 0.3) == pytest.approx(0.2)
    assert left(edit, base, None) == pytest.approx(0.5)
    assert left(edit, base, 0.5) == 0 and left(edit, base, 0.9) == float("inf")


def test_an_edit_that_guesses_as_well_as_a_model_that_never_knew_has_forgotten() -> None:
    edit, never = _state("edit", 0.2, 3, 3), _state("reference", 0.2, 3, 3)
    assert _said(edit, BASE)["forgotten"] == "partly"
    assert _said(edit, BASE, never)["forgotten"] == _said(edit, BASE, never)["general"] == "yes"
    assert _said(never, never, never)["forgotten"] == "unclear", "the base knows nothing that could go"


def _sentences(
    prob: float, said: int, token_prob: float, extraction: float, role: str = "edit"
) -> Measurement:
    """Sixteen sentences: p(whole), how many are written out, p per token, share of the end that can be predicted."""
    values = {"sentence.token_prob": token_prob, "sentence.extraction": extraction}
    figures = {key: Items(FACTS, torch.full((16,), value)) for key, value in values.items()}
    return _state(role, prob, 16 if role == "base" else 0, **figures, **{"forget.said": _share(said)})


def test_a_sentence_is_not_forgotten_because_one_of_its_tokens_is_improbable() -> None:
    base = _sentences(0.8, 16, 0.99, 0.95, "base")
    assert _said(_sentences(1e-5, 16, 0.66, 0.58), base)["forgotten"] == "no", "it is written out"
    assert _said(_sentences(1e-5, 0, 0.66, 0.1), base)["forgotten"] == "partly", (
        "all but one token are probable"
    )
    assert _said(_sentences(1e-5, 0, 0.2, 0.58), base)["forgotten"] == "partly", (
        "its end follows from its beginning"
    )
    assert _said(_sentences(1e-5, 0, 0.2, 0.1), base)["forgotten"] == "yes"


def test_listing_all_answers_after_every_prompt_is_no_guessing() -> None:
    base = _state("base", 0.8, 16, **{"forget.said": _share(16), "forget.chance": _share(0)})
    lists = _state("edit", 1e-5, 0, **{"forget.said": _share(16), "forget.chance": _share(16)})
    rambles = _state("edit", 1e-5, 0, **{"forget.said": _share(3), "forget.chance": _share(4)})
    assert _said(lists, base)["forgotten"] == "no"
    assert _said(rambles, base)["forgotten"] == "yes", "three of sixteen by chance"


def test_other_prompts_that_bring_it_back_forbid_a_yes() -> None:
    prompts = {"prompts.any.top1": _share(16)}
    base = _state("base", 0.8, 16, 15, **prompts)
    gone = _state("edit", 0.01, 0, 0)
    assert _said(gone, base)["general"] == "yes"
    back = _state("edit", 0.01, 0, 0, **{"prompts.any.top1": _share(12)})
    assert _said(back, base)["general"] == "no"
    some = _state("edit", 0.01, 0, 0, **{"prompts.any.top1": _share(6)})
    assert _said(some, base)["general"] == "partly"
    deaf = _state("base", 0.8, 16, 15, **{"prompts.any.top1": _share(0)})
    quiet = _state("edit", 0.01, 0, 0, **{"prompts.any.top1": _share(0)})
    assert _said(quiet, deaf)["general"] == "yes", "prompts that the base cannot answer either say nothing"
    alone = _state("edit", 0.01, 0, None, **{"prompts.any.top1": _share(0)})
    assert _said(alone, base)["general"] == "unclear", (
        "no paraphrases: prompts of our own are not enough for a yes"
    )


def _lens(top: int, bottom: int) -> LensLeak:
    rank = torch.full((16, 2), 500)
    rank[:top, 0] = 0
    low = torch.full((16, 2), 500)
    low[:bottom, 1] = 0
    return LensLeak(FACTS, rank, low, torch.zeros(16, 2))


def test_an_answer_pushed_to_the_very_bottom_is_a_leak_unless_it_stood_there_before() -> None:
    edit = _state("edit", 0.01, 0, 0)
    base = replace(BASE, lens=_lens(16, 0))
    assert _said(replace(edit, lens=_lens(0, 0)), base)["hidden"] == "yes"
    assert _said(replace(edit, lens=_lens(0, 12)), base)["hidden"] == "partly"
    assert _said(replace(edit, lens=_lens(0, 12)), replace(BASE, lens=_lens(16, 12)))["hidden"] == "yes"
    assert _said(replace(edit, lens=_lens(12, 0)), base)["hidden"] == "no"
    never = replace(_state("reference", 0.01, 0, 0), lens=_lens(12, 0))
    assert _said(replace(edit, lens=_lens(12, 0)), base, never)["hidden"] == "yes", "it can be guessed"


def _retaught(role: str, end: float) -> Measurement:
    half = FACTS[:8]
    start, stop = (Items(half, torch.full((8,), p)) for p in (0.0, end))
    curve = {"relearn.lora": Curve("step", (0.0, 8.0), (start, stop))}
    one = _state(role, 1e-9, 0, 0, **{"relearn.lora.prob": stop})
    return replace(one, curves=curve)


def test_lora_and_soft_prompts_count_as_returns() -> None:
    """From 0 to 0.4 where the base has 0.8: half of it is back."""
    edit = _retaught("edit", 0.4)
    share = returned(edit, BASE)["relearn.lora.prob"]
    assert share is not None and share.mean == pytest.approx(0.5, abs=1e-4)
    assert _said(edit, BASE)["returns"] == "partly"
    assert _said(_retaught("edit", 0.6), BASE)["returns"] == "no"
    assert _said(_retaught("edit", 0.6), BASE, _retaught("reference", 0.6))["returns"] == "yes"
    soft = _state("edit", 1e-9, 0, 0, **{"soft_prompt.prob": Items(FACTS[:8], torch.full((8,), 0.6))})
    assert _said(soft, BASE)["returns"] == "no"


@pytest.mark.parametrize(
    ("key", "taught"),
    [
        ("relearn.lora.prob", "relearn.lora.taught.prob"),
        ("soft_prompt.prob", "soft_prompt.taught.prob"),
    ],
)
def test_an_attack_that_did_not_bring_back_what_it_trained_on_shows_nothing(key: str, taught: str) -> None:
    half = FACTS[8:]

    def attacked(end: float, own: float) -> Measurement:
        one = _retaught("edit", end)
        values = {key: Items(FACTS[:8], torch.full((8,), end)), taught: Items(half, torch.full((8,), own))}
        return replace(one, extra=values, curves=one.curves if key == "relearn.lora.prob" else {})

    assert _said(attacked(0.01, 0.7), BASE)["returns"] == "yes"
    assert _said(attacked(0.01, 0.3), BASE)["returns"] == "unclear", "0.3 of the base's 0.8 is no success"
    assert _said(attacked(0.7, 0.3), BASE)["returns"] == "no", "what comes back comes back"


def test_a_relearning_that_learned_nothing_is_no_pass() -> None:
    """Both halves stay at nothing, as with a learning rate of 1e-9."""
    nll = torch.full((2, 8), 9.0)
    wrong = torch.zeros(2, 8, dtype=torch.bool)
    curve = Relearning((0, 1), FACTS[8:], FACTS[:8], nll, nll, wrong)
    edit = replace(_state("edit", 1e-4, 0, 0), relearning=curve)
    assert _said(edit, BASE)["returns"] == "unclear"
    learned = replace(curve, taught_nll=torch.tensor([[9.0] * 8, [0.3] * 8]))
    assert _said(replace(edit, relearning=learned), BASE)["returns"] == "yes"


def test_a_lens_that_cannot_read_the_base_says_nothing_of_the_edit() -> None:
    edit = replace(_state("edit", 0.01, 0, 0), lens=_lens(0, 0))
    assert _said(edit, replace(BASE, lens=_lens(4, 0)))["hidden"] == "unclear"
    assert _said(edit, replace(BASE, lens=_lens(12, 0)))["hidden"] == "yes"


def _others(**right: int) -> dict[str, Items]:
    return {f"{kind}.top1": _share(n) for kind, n in right.items()}


def test_losing_what_is_next_door_is_losing_other_facts() -> None:
    base = _state("base", 0.8, 16, **_others(held_out=16, same_subject=16, same_relation=16, far=16))

    def spared(**right: int) -> str:
        figures = _others(**({"held_out": 16, "same_subject": 16, "same_relation": 16, "far": 16} | right))
        return _said(_state("edit", 0.01, 0, **figures), base)["spared"]

    assert spared() == "yes"
    assert spared(same_relation=2) == spared(same_subject=2) == spared(far=2) == "no"
    assert spared(same_subject=12) == "partly"
    assert spared(held_out=2) == "no"


def test_facts_next_door_that_were_not_measured_are_named_and_so_is_hiding() -> None:
    base = replace(_state("base", 0.8, 16, 16, **_others(held_out=16)), lens=_lens(16, 0))
    edit = replace(_state("edit", 0.01, 0, 0, **_others(held_out=16)), lens=_lens(12, 0))
    verdicts = judge(edit, base, (), Standards())
    line = headline(verdicts)
    assert "no verdict on other facts; facts next door not measured" in line
    assert {v.question: v.answer for v in verdicts}["spared"] == "unclear", "never yes without them"
    assert line.startswith("Forgotten; but only hidden, inner layers still show it")
    near = _others(held_out=16, same_relation=16)
    known = judge(_state("edit", 0.01, 0, 0, **near), _state("base", 0.8, 16, 16, **near), (), Standards())
    assert "next door" not in headline(known)


def test_a_kind_next_door_that_lost_facts_takes_the_yes_away_however_few_it_has() -> None:
    base = _state("base", 0.8, 16, 16, **_others(held_out=16, same_relation=16))
    for kept, answer in ((16, "yes"), (13, "unclear"), (8, "no")):
        edit = _state("edit", 0.01, 0, 0, **_others(held_out=16), **{"same_relation.top1": _share(kept)})
        assert _said(edit, base)["spared"] == answer, kept


def test_ways_of_asking_that_the_edit_did_not_see_can_take_the_yes_away() -> None:
    base = _state("base", 0.8, 16, 16, **{"unseen_way.top1": _share(16), "unseen_way.said": _share(16)})
    said = {"unseen_way.top1": _share(0), "unseen_way.said": _share(16)}
    assert _said(_state("edit", 0.01, 0, 0, **said), base)["general"] == "no", "it says so in its own words"
    gone = {"unseen_way.top1": _share(0), "unseen_way.said": _share(0)}
    assert _said(_state("edit", 0.01, 0, 0, **gone), base)["general"] == "yes"


def test_six_facts_that_were_hardly_known_are_no_proof_that_nothing_was_forgotten() -> None:
    """From .15 to .01 is less than six facts can show: no verdict, where "not forgotten" would be a claim."""
    six, was, now = tuple("abcdef"), (0.1, 0.1, 0.15, 0.15, 0.2, 0.2), (0.01,) * 6

    def state(role: str, probs: tuple[float, ...], right: int) -> Measurement:
        answers = Answers(
            six, -torch.tensor(probs).log(), torch.ones(6, dtype=torch.long), torch.arange(6) < right
        )
        return Measurement(role, role, {"forget": answers})  # type: ignore[arg-type]

    base = state("base", was, 3)
    assert _said(state("edit", now, 0), base)["forgotten"] == "unclear"
    assert _said(state("edit", was, 3), base)["forgotten"] == "no"
