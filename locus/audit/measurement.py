"""Everything measured of one model state, item by item, and how each figure is read off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from locus.audit.figure_values import Curve
from locus.audit.intervals import Items
from locus.audit.neutral_text import TextScores
from locus.audit.questions import QUESTION_KINDS, Answers
from locus.audit.settings import WEIGHT_FORMATS, WeightFormat
from locus.audit.state import StateRole


@dataclass(frozen=True)
class Relearning:
    """The curve of one model state under the attack."""

    steps: tuple[int, ...]
    """Training steps taken; 0 is before the attack."""
    taught: tuple[str, ...]
    """Fact ids of the half that was trained on."""
    tested: tuple[str, ...]
    """Fact ids of the other half."""
    taught_nll: Float[Tensor, "step taught"]
    tested_nll: Float[Tensor, "step tested"]
    """Negative log-likelihood of the whole target, never trained on, in nats."""
    tested_correct: Bool[Tensor, "step tested"]

    @property
    def taught_prob(self) -> Float[Tensor, "step taught"]:
        """Probability of the whole target."""
        return (-self.taught_nll).exp()

    @property
    def tested_prob(self) -> Float[Tensor, "step tested"]:
        """Probability of the whole target."""
        return (-self.tested_nll).exp()

    def taught_items(self, step: int = -1) -> Items:
        """p(target) of the taught half at one point of the curve: whether the attack did its own task."""
        return Items(self.taught, self.taught_prob[step])

    def tested_items(self, step: int = -1) -> Items:
        """p(target) of the untaught half at one point of the curve (an index into `steps`)."""
        return Items(self.tested, self.tested_prob[step])


@dataclass(frozen=True)
class LensLeak:
    """Where the first target token stands at each layer, at the last prompt position."""

    facts: tuple[str, ...]
    rank: Int[Tensor, "fact layer"]
    """0 where the layer alone would answer right."""
    bottom_rank: Int[Tensor, "fact layer"]
    """0 where the target is the least likely token of all."""
    prob: Float[Tensor, "fact layer"]
    """Probability of the first target token through the lens."""

    def top(self, k: int) -> Bool[Tensor, "fact layer"]:
        """Whether the target is among the k likeliest tokens."""
        return self.rank < k

    def bottom(self, k: int) -> Bool[Tensor, "fact layer"]:
        """Whether the target is among the k least likely tokens."""
        return self.bottom_rank < k

    def anywhere(self, k: int, end: str = "top") -> Items:
        """1 for a fact whose target is in the top (bottom) k of at least one layer."""
        hit = self.top(k) if end == "top" else self.bottom(k)
        return Items(self.facts, hit.any(1).float())


@dataclass(frozen=True)
class Rounded:
    """One model state after rounding its weights."""

    format: WeightFormat
    forget: Answers
    held_out: Answers
    """Asked at int4 only, the one format that hurts by itself; else empty."""


@dataclass(frozen=True)
class Measurement:
    """One model state, measured. What was not measured is None or absent, never zero."""

    name: str
    role: StateRole
    answers: Mapping[str, Answers]
    """By kind of question; a kind without questions is absent."""
    text: TextScores | None = None
    lens: LensLeak | None = None
    relearning: Relearning | None = None
    rounding: tuple[Rounded, ...] = ()
    written: tuple[str, ...] = ()
    """What the model wrote after each forget prompt, greedily; empty where it was not asked to."""
    extra: Mapping[str, Items] = field(default_factory=dict)
    """Values of the further attacks and suites, by figure key."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """Figures of suites that are one number for the whole set (a p-value, a harmonic mean), by figure key."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Curves of the further attacks, by their own names."""
    seconds: float = 0.0
    """On the clock, neutral text not counted."""
    processor_seconds: float = 0.0
    """Of all threads of the CPU, which other work on the machine does not lengthen."""

    def items(self, key: str) -> Items | None:
        """The values behind one figure; None where it was not measured."""
        if key in self.extra:
            return self.extra[key]
        return READ[key](self) if key in READ else None


def _of(
    kind: str, what: Literal["prob", "token_prob", "top1", "surprise"]
) -> Callable[[Measurement], Items | None]:
    def read(m: Measurement) -> Items | None:
        if (answers := m.answers.get(kind)) is None:
            return None
        found: Items = getattr(answers, what)
        return found

    return read


def _lens(k: int, end: str) -> Callable[[Measurement], Items | None]:
    return lambda m: None if m.lens is None else m.lens.anywhere(k, end)


def _rounded(fmt: WeightFormat, kind: Literal["forget", "held_out"]) -> Callable[[Measurement], Items | None]:
    def read(m: Measurement) -> Items | None:
        for one in m.rounding:
            answers = one.forget if kind == "forget" else one.held_out
            if one.format == fmt and answers.facts:
                return answers.prob if kind == "forget" else answers.top1
        return None

    return read


READ: Mapping[str, Callable[[Measurement], Items | None]] = {
    "forget.prob": _of("forget", "prob"),
    "forget.token_prob": _of("forget", "token_prob"),
    "forget.top1": _of("forget", "top1"),
    "forget.nll": _of("forget", "surprise"),
    "paraphrase.prob": _of("paraphrase", "prob"),
    "paraphrase.top1": _of("paraphrase", "top1"),
    "held_out.prob": _of("held_out", "prob"),
    **{f"{kind}.top1": _of(kind, "top1") for kind in QUESTION_KINDS if kind not in ("forget", "paraphrase")},
    "text.kl": lambda m: None if m.text is None else m.text.kl_items,
    "text.nll": lambda m: None if m.text is None else m.text.nll_items,
    **{f"lens.{end}{k}": _lens(k, end) for end in ("top", "bottom") for k in (4, 10)},
    "relearn.taught.prob": lambda m: None if m.relearning is None else m.relearning.taught_items(),
    "relearn.prob": lambda m: None if m.relearning is None else m.relearning.tested_items(),
    **{f"{fmt}.forget.prob": _rounded(fmt, "forget") for fmt in WEIGHT_FORMATS},
    "int4.held_out.top1": _rounded("int4", "held_out"),
}
"""Figure key -> where its values are in a measurement."""
