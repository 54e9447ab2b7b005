"""Everything measured of one model state, item by item, and the table of figures that are read off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from locus.audit.answers import Answers
from locus.audit.interval import Items
from locus.audit.leak import LensLeak
from locus.audit.relearn import Relearning
from locus.audit.rounding import Format, Rounded
from locus.audit.state import Role
from locus.audit.text import TextScores

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Measurement:
    """One model state, measured. What was not measured is None or absent, never zero."""

    name: str
    role: Role
    answers: Mapping[str, Answers]
    """By kind of question; a kind without questions is absent."""
    text: TextScores | None = None
    lens: LensLeak | None = None
    relearning: Relearning | None = None
    rounding: tuple[Rounded, ...] = ()
    extra: Mapping[str, Items] = field(default_factory=dict)
    """Figures of the further suites and attacks, by their key."""
    seconds: float = 0.0

    def items(self, key: str) -> Items | None:
        """The values behind one figure of the table; None where it was not measured."""
        if key in self.extra:
            return self.extra[key]
        return FIGURES[key].read(self) if key in FIGURES else None


@dataclass(frozen=True)
class Figure:
    """One figure of an audit: what it is called, what it means, where it is read."""

    key: str
    label: str
    section: str
    """Which question it helps to answer: forgotten, general, spared, intact, hidden, returns."""
    better: Better
    unit: Literal["share", "nats"]
    definition: str
    read: Callable[[Measurement], Items | None]


def _of(kind: str, what: Literal["prob", "top1", "surprise"]) -> Callable[[Measurement], Items | None]:
    def read(m: Measurement) -> Items | None:
        answers = m.answers.get(kind)
        return None if answers is None else getattr(answers, what)

    return read


def _lens(k: int, end: str) -> Callable[[Measurement], Items | None]:
    return lambda m: None if m.lens is None else m.lens.anywhere(k, end)


def _rounded(fmt: Format, kind: Literal["forget", "held_out"]) -> Callable[[Measurement], Items | None]:
    def read(m: Measurement) -> Items | None:
        for one in m.rounding:
            if one.format == fmt and len((answers := getattr(one, kind)).facts):
                return answers.prob if kind == "forget" else answers.top1
        return None

    return read


def _table() -> tuple[Figure, ...]:
    figures = [
        Figure(
            "forget.prob",
            "p(target)",
            "forgotten",
            "lower",
            "share",
            "Probability of the whole target after its prompt, teacher-forced; mean over forget facts.",
            _of("forget", "prob"),
        ),
        Figure(
            "forget.top1",
            "answered right",
            "forgotten",
            "lower",
            "share",
            "Share of forget facts whose every target token is the model's first choice.",
            _of("forget", "top1"),
        ),
        Figure(
            "forget.nll",
            "NLL of the target",
            "forgotten",
            "higher",
            "nats",
            "Negative log-likelihood of the whole target; mean over forget facts.",
            _of("forget", "surprise"),
        ),
        Figure(
            "paraphrase.prob",
            "p(target), paraphrased",
            "general",
            "lower",
            "share",
            "Probability of the whole target after other wordings of the prompt, which the edit did not see.",
            _of("paraphrase", "prob"),
        ),
        Figure(
            "paraphrase.top1",
            "paraphrases right",
            "general",
            "lower",
            "share",
            "Share of paraphrased prompts still answered right.",
            _of("paraphrase", "top1"),
        ),
        Figure(
            "held_out.top1",
            "held-out facts right",
            "spared",
            "higher",
            "share",
            "Share of facts answered right that were neither forgotten nor trained on.",
            _of("held_out", "top1"),
        ),
        Figure(
            "held_out.prob",
            "p(target), held-out facts",
            "spared",
            "higher",
            "share",
            "Probability of the whole target of facts that were neither forgotten nor trained on.",
            _of("held_out", "prob"),
        ),
        Figure(
            "held_out_near.top1",
            "near: same relation",
            "spared",
            "higher",
            "share",
            "Held-out facts that share a relation with a forgotten fact, answered right.",
            _of("held_out_near", "top1"),
        ),
        Figure(
            "held_out_far.top1",
            "far: other relations",
            "spared",
            "higher",
            "share",
            "Held-out facts of relations that no forgotten fact has, answered right.",
            _of("held_out_far", "top1"),
        ),
        Figure(
            "neighbour.top1",
            "neighbours right",
            "spared",
            "higher",
            "share",
            "Share of neighbour prompts (similar subjects, other answers) answered right.",
            _of("neighbour", "top1"),
        ),
        Figure(
            "retained.top1",
            "retained facts right",
            "spared",
            "higher",
            "share",
            "Share answered right of the retain facts that an edit was free to train on: a floor, not a test.",
            _of("retained", "top1"),
        ),
        Figure(
            "text.kl",
            "KL on neutral text",
            "intact",
            "lower",
            "nats",
            "KL(base || edited) per token over the whole vocabulary, on neutral paragraphs.",
            lambda m: None if m.text is None else m.text.kl_items,
        ),
        Figure(
            "text.nll",
            "NLL on neutral text",
            "intact",
            "lower",
            "nats",
            "Negative log-likelihood per token on neutral paragraphs; its exponential is the perplexity.",
            lambda m: None if m.text is None else m.text.nll_items,
        ),
    ]
    for k in (4, 10):
        figures.append(
            Figure(
                f"lens.top{k}",
                f"lens: in some layer's top {k}",
                "hidden",
                "lower",
                "share",
                f"Share of forget facts whose first target token is among the {k} likeliest at one layer at least, "
                "read through the logit lens at the last prompt position.",
                _lens(k, "top"),
            )
        )
    for k in (4, 10):
        figures.append(
            Figure(
                f"lens.bottom{k}",
                f"lens: in some layer's bottom {k}",
                "hidden",
                "lower",
                "share",
                f"Share of forget facts whose first target token is among the {k} least likely at one layer at least: "
                "pushed so far down that it shows.",
                _lens(k, "bottom"),
            )
        )
    figures.append(
        Figure(
            "relearn.prob",
            "p(target) after relearning",
            "returns",
            "lower",
            "share",
            "Probability of the targets of one half of the forget facts after fine-tuning on the other half.",
            lambda m: None if m.relearning is None else m.relearning.tested_items(),
        )
    )
    for fmt in ("bfloat16", "int8", "int4"):
        figures.append(
            Figure(
                f"{fmt}.forget.prob",
                f"p(target) in {fmt}",
                "returns",
                "lower",
                "share",
                f"Probability of the forget targets after rounding the weights to {fmt} (nearest, uncalibrated).",
                _rounded(fmt, "forget"),  # type: ignore[arg-type]
            )
        )
    figures.append(
        Figure(
            "int4.held_out.top1",
            "held-out right in int4",
            "returns",
            "higher",
            "share",
            "Held-out facts right after the same rounding to int4: read it beside the rounded base.",
            _rounded("int4", "held_out"),
        )
    )
    return tuple(figures)


FIGURES: Mapping[str, Figure] = {figure.key: figure for figure in _table()}
