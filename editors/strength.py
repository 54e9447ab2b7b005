"""How strong an edit must be: its effect as a function of strength, and the smallest strength that reaches a goal.

An edit of weights is a direction: old + strength · step. The strength curve shows what each strength does to the
forget facts and to everything else; bisection finds the smallest strength that brings the forget facts' mean
probability down to a goal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from editors.deltas import changed
from editors.editor import EditData, Log
from editors.key_value.down_projections import borrowed
from locus import progress
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Fact, trainable_facts
from locus.forward import batches, label_logits, measure
from locus.mask import WeightMask
from locus.metrics import kl_divergence
from locus.model import Model
from locus.selection import Selection
from locus.tokens import encode_text

N_RETAIN, N_TEXT = 32, 2
"""Retain facts and paragraphs that a strength is judged by."""
STEPS = 8
"""Halvings of the interval."""
AROUND = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Strengths of the curve where none are given, in units of the strength found."""


@dataclass(frozen=True)
class StrengthSearch:
    """How an editor chooses its strength: fields that every such editor has."""

    strength_goal: float = 0.0
    """Take the smallest strength, up to the editor's own, that brings the forget facts' mean probability down to this;
    0 for all of it."""
    strength_curve: tuple[float, ...] = ()
    """Strengths at which forget facts, retain facts and text are measured; with a goal and no strengths given, some
    around the strength found."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength_goal < 1:
            raise InputError(
                f"strength_goal = {self.strength_goal}: a probability below 1, or 0 for full strength"
            )


@dataclass(frozen=True, eq=False)
class Direction:
    """Where an edit of strength 1 goes: parameter name -> entries and what is added to them."""

    selections: Mapping[str, Selection]
    steps: Mapping[str, Float[Tensor, "..."]]
    """Shaped as `Selection.take` gives them."""

    @contextlib.contextmanager
    def at(self, model: Model, strength: float) -> Iterator[None]:
        """Hold the edited weights in memory; afterwards every bit is as it was.

        Raises:
            InputError: the model in memory is not its checkpoint.
        """
        with borrowed(model, self.selections), self._held(model, strength):
            yield

    @contextlib.contextmanager
    def _held(self, model: Model, strength: float) -> Iterator[None]:
        kept: list[tuple[Tensor, Selection, Tensor]] = []
        try:
            for name, selection in self.selections.items():
                parameter: Tensor = model.module.get_parameter(name)
                old = selection.take(parameter)
                kept.append((parameter, selection, old))
                new = old.double() + strength * self.steps[name].double().to(old.device)
                selection.put_(parameter, new.to(old.dtype))
            yield
        finally:
            for parameter, selection, old in reversed(kept):
                selection.put_(parameter, old)

    def delta(
        self, model: Model, strength: float, mask: WeightMask, provenance: Mapping[str, Any]
    ) -> WeightDelta:
        """The edit of this strength as the artefact."""
        return changed(
            model,
            self.selections,
            lambda name, old: old.double() + strength * self.steps[name].double(),
            mask,
            provenance,
        )


@dataclass(frozen=True)
class StrengthPoint:
    """What one strength does."""

    strength: float
    forget_prob: float
    """Mean probability of the forget targets."""
    forget_right: float
    """Share of them that are still the first choice."""
    retain_right: float | None = None
    """Share of the retain facts that the base has right which are still right; None if not looked at."""
    kl: float | None = None
    """KL(base || edited) on neutral text, nats a token; None if not looked at."""


@dataclass(frozen=True, eq=False)
class StrengthJudge:
    """The facts and texts that strengths are judged by, and what the base says of them."""

    model: Model
    forget: Sequence[Fact]
    retain: Sequence[Fact]
    """Those that the base has right and that are not held out, at most `N_RETAIN`."""
    base_logits: Sequence[Float[Tensor, "label d_vocab"]]
    text: Sequence[Any]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: Model, forget: Sequence[Fact], retain: Sequence[Fact], text: Sequence[str]
    ) -> StrengthJudge:
        """Measure the base, which must be in memory.

        Raises:
            InputError: nothing to forget.
        """
        if not forget:
            raise InputError("a strength is chosen by the forget facts: the list of them is empty")
        kept = trainable_facts(retain)[:N_RETAIN]
        right = measure(model, kept).correct.tolist() if kept else []
        blocks = [block for paragraph in text[:N_TEXT] for block in encode_text(model, paragraph)]
        texts = batches(blocks) if blocks else []
        return cls(
            model,
            forget,
            [fact for fact, is_right in zip(kept, right, strict=True) if is_right],
            [label_logits(model, batch) for batch in texts],
            texts,
        )

    @torch.no_grad()
    def look(self, direction: Direction, strength: float, all_round: bool = True) -> StrengthPoint:
        """What this strength does: to the forget facts, and if `all_round` to everything."""
        with direction.at(self.model, strength):
            forgotten = measure(self.model, self.forget)
            kept = measure(self.model, self.retain) if self.retain and all_round else None
            kls = [
                kl_divergence(base, label_logits(self.model, batch))
                for batch, base in zip(self.text, self.base_logits, strict=True)
                if all_round
            ]
        return StrengthPoint(
            strength,
            float(forgotten.prob.mean()),
            float(forgotten.correct.float().mean()),
            None if kept is None else float(kept.correct.float().mean()),
            float(torch.cat(kls).mean()) if kls else None,
        )


def curve(judge: StrengthJudge, direction: Direction, strengths: Sequence[float]) -> list[StrengthPoint]:
    """The effect of each strength."""
    return [judge.look(direction, s) for s in progress.track(strengths, "strength curve")]


def smallest(
    judge: StrengthJudge, direction: Direction, goal: float, most: float
) -> tuple[float, list[StrengthPoint]]:
    """The smallest strength in (0, most] that brings the facts' mean probability to `goal`, by bisection.

    Where more strength does not always mean less probability, it is the end of an interval in which the goal is
    crossed: reached at the strength returned, not reached at one at most most/2^STEPS below it.

    Returns:
        The strength, `most` where not even that reaches the goal; and every point measured, in order, of the forget
        facts only.
    """
    points = [judge.look(direction, most, all_round=False)]
    low, high = 0.0, most
    if points[0].forget_prob <= goal:
        for _ in progress.track(range(STEPS), "strength"):
            middle = (low + high) / 2
            points.append(judge.look(direction, middle, all_round=False))
            if points[-1].forget_prob <= goal:
                high = middle
            else:
                low = middle
    return high, points


def delta_at_strength(
    model: Model,
    direction: Direction,
    mask: WeightMask,
    strength: float,
    search: StrengthSearch,
    data: EditData,
    *,
    provenance: Mapping[str, Any],
    log: Log | None,
) -> WeightDelta:
    """The edit at `strength`, or at the smallest strength up to it that reaches the goal, if there is a goal.

    Args:
        model: The base, in memory; every bit is as before afterwards.
        direction: The edit of strength 1.
        mask: Where changes are allowed.
        strength: The one to take, or the largest to try.
        search: Goal and curve; the editor itself.
        data: Facts and texts; looked at only for a goal or a curve.
        provenance: JSON values to keep; the curve is added, by strength, as "strength_curve".
        log: Called with every point of the curve.

    Raises:
        InputError: a goal or a curve without facts.
    """
    about: dict[str, Any] = {**provenance, "strength": strength}
    if search.strength_goal or search.strength_curve:
        judge = StrengthJudge.of(model, data.forget, data.retain, data.text)
        wanted = list(search.strength_curve)
        points: list[StrengthPoint] = []
        if search.strength_goal:
            about["strength"], points = smallest(judge, direction, search.strength_goal, strength)
            about["reached"] = min(point.forget_prob for point in points) <= search.strength_goal
            wanted = wanted or [share * about["strength"] for share in AROUND]
        points = [point for point in points if point.strength not in wanted]
        points = sorted([*points, *curve(judge, direction, wanted)], key=lambda point: point.strength)
        about["strength_curve"] = [asdict(point) for point in points]
        if log is not None:
            for point in points:
                log(asdict(point))
    return direction.delta(model, about["strength"], mask, about)
