"""What `frontier` edits, and how it is judged: here sixteen facts; TOFU is in `frontier_tofu`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from locus.audit import Audit, AuditSettings, audit
from locus.audit.questions import Answers
from locus.delta import WeightDelta
from locus.fact import Fact, neutral_text, read_facts, split_text, trainable_facts
from locus.mask import WeightMask
from locus.model import Model, load_model

Figures = dict[str, Any]
"""Figure -> its mean and, where it has one, its interval: `mean`, `low`, `high`."""


@dataclass(frozen=True, eq=False)
class Questions:
    """What is forgotten, and what shall stay: what an edit may see of it and what only judges."""

    name: str
    forget: list[Fact]
    retain: list[Fact]
    """Those marked held_out are never trained on."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its questions, and the judge of an edit of the reported ones."""

    name: str
    model: Model
    reported: Questions
    text: list[str]
    """Neutral paragraphs that an edit may read."""
    columns: Mapping[str, str]
    """Figures of the table, and what stands above them."""
    panels: Mapping[str, str]
    """Those that the picture shows against `kl`."""
    judge: Callable[[WeightDelta, WeightMask], Figures]
    kl: str = "kl"
    beside: Callable[[], Mapping[str, Figures]] = dict
    """Models that are not edited, by name: the figures of what edits start from, and of what they should end as."""
    tuning: Questions | None = None
    """Other questions, on which rates are found; None takes those of the facts."""
    likely: Callable[[Answers], Float[Tensor, " question"]] = lambda answers: answers.prob.values
    """What is brought down to `goal`."""
    goal: float = 0.01
    """The mean of `likely` at which arms are compared."""
    forget_per_step: int = 16
    retain_facts: int = 8
    """Retain facts a step."""
    points: int = 20
    """Of knowledge neurons' integrals."""


def facts_case() -> Case:
    """The 16 facts of demo-forget; tuned on 16 of the same eight kinds, out of demo-retain's training half.

    A half of what is left of that half is what a tuning edit may see, the other half judges it: the held-out facts
    of demo-retain are never looked at while tuning.
    """
    model = load_model("smollm2")
    forget, retain = read_facts("demo-forget"), read_facts("demo-retain")
    text, unseen = split_text(neutral_text())
    kinds = list(dict.fromkeys(fact.relation for fact in forget))
    trained = trainable_facts(retain)
    chosen = [fact for kind in kinds for fact in [f for f in trained if f.relation == kind][:2]]
    left = [fact for fact in trained if fact not in chosen]
    reported = Questions("reported", forget, retain)
    judge = AuditJudge(model, reported, unseen)
    return Case(
        "facts",
        model,
        reported,
        text,
        AUDITED,
        {
            "neighbour.top1": "neighbours right (high is good)",
            "paraphrase.top1": "paraphrases right (low is good)",
            "relearn.prob": "p relearned (low is good)",
        },
        judge,
        "text.kl",
        beside=lambda: {"before": figures_of(judge.base, "base")},
        tuning=Questions("tuning", chosen, halved(left)),
    )


AUDITED = {
    "forget.prob": "p",
    "paraphrase.top1": "paraphrases right",
    "held_out.top1": "held-out right",
    "held_out_near.top1": "near held-out",
    "neighbour.top1": "neighbours right",
    "text.kl": "KL",
    "lens.top10": "lens top 10",
    "relearn.prob": "p relearned",
    "relearn.top1": "right relearned",
}


@dataclass(frozen=True, eq=False)
class AuditJudge:
    """`locus.audit` on the questions; the base is asked once."""

    model: Model
    asked: Questions
    unseen: Sequence[str]
    """Neutral paragraphs that judge."""

    @cached_property
    def base(self) -> Audit:
        """What the base says; a delta that changes nothing stands for the edit."""
        nothing = WeightDelta({}, {}, {}, self.model.fingerprint)
        return audit(
            self.model,
            {"nothing": nothing},
            self.asked.forget,
            self.asked.retain,
            self.unseen,
            settings=SETTINGS,
        )

    def __call__(self, delta: WeightDelta, mask: WeightMask) -> Figures:
        """The figures of one edit."""
        judged = audit(
            self.model, {"edit": delta}, self.asked.forget, self.asked.retain, self.unseen,
            masks={"edit": mask}, settings=SETTINGS, before=self.base,
        )  # fmt: skip
        return figures_of(judged, "edit")


def figures_of(judged: Audit, role: str) -> Figures:
    """The table's figures of the only state of a role; nothing may have changed outside its mask."""
    state = next(s for s in judged.document()["states"] if s["role"] == role)
    assert not (state["change"] or {}).get("off_mask"), "weights outside the mask differ"
    figures = {k: state["figures"].get(k) for k in AUDITED if k != "relearn.top1"}
    curve = state["curves"].get("relearn")
    return {**figures, "relearn.top1": {"mean": curve["tested_top1"][-1] if curve else None}}


SETTINGS = AuditSettings(attacks=("lens", "relearn"), text_tokens=1024)


def halved(facts: Sequence[Fact]) -> list[Fact]:
    """Every second one is held out."""
    return [replace(fact, held_out=bool(i % 2)) for i, fact in enumerate(facts)]
