"""Which engine answers: replay where the model can be replayed, whole forwards where it cannot.

Questions are also tests: of the longest and the shortest of the first ones, and of each later one that is longer
than all before, some cells are answered both ways. If the two differ, if only one is finite, or if a block refuses to
be replayed, the plain engine takes over for good, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.model import Model
from locus.throughput import matrix_peak
from tracing.patching.plain_engine import answer_plainly
from tracing.patching.readout import Readout
from tracing.patching.runs import Asked, PatchingQuestion, RunScores
from tracing.patching.sites import PatchedRun

EngineName = Literal["auto", "replay", "plain"]
ENGINES: tuple[EngineName, ...] = ("auto", "replay", "plain")

_CHECKED_CELLS = 4
_REPLAYED_CELLS = 48
"""Cells of a check that are replayed side by side with those that are compared: rows must not see each other's."""
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest difference of a log-probability, in nats, that counts as rounding."""


@dataclass
class Engine:
    """Answers questions about one model, and remembers how."""

    model: Model
    wanted: EngineName = "auto"
    """"auto": replay, or plain with a warning where replay is not possible or not right; "replay": refuse
    instead of falling back; "plain"."""
    batch_tokens: int | None = None
    """Tokens computed at once; None for the engine's own choice."""
    used: str = field(default="", init=False)
    """What answered last: "replay", "plain", or "plain (why)"."""
    _checked_until: int = field(default=0, init=False)
    """Positions of the longest question that was checked."""
    _refused: str = field(default="", init=False)

    def __post_init__(self) -> None:
        if self.wanted not in ENGINES:
            raise InputError(f"engine {self.wanted!r}: not one of {', '.join(ENGINES)}")

    def answer(self, question: PatchingQuestion, cells: Sequence[PatchedRun], readout: Readout) -> RunScores:
        """The scores of both runs and of every cell."""
        return self.answer_all([Asked(question, cells, readout)])[0]

    def answer_all(self, asked: Sequence[Asked]) -> list[RunScores]:
        """Answer several questions, their rows side by side where they are replayed."""
        if self.wanted == "plain" or self._refused:
            return self._plainly(asked)
        from tracing.replay.blocks import CannotReplay, attention_of, failures_refuse_replay, masked_attention
        from tracing.replay.replay_engine import answer_together

        try:
            for one in self._unchecked(asked):
                self._check(one)
            with failures_refuse_replay():
                answers = answer_together(self.model, asked, batch_tokens=self.batch_tokens)
        except CannotReplay as reason:
            if self.wanted == "replay":
                raise InputError(
                    f"{self.model.name} cannot be replayed: {reason}; use the plain engine"
                ) from None
            warnings.warn(
                f"{self.model.name}: tracing with whole forwards, many times slower: {reason}", stacklevel=2
            )
            self._refused = str(reason)
            return self._plainly(asked)
        chosen = attention_of(self.model)
        with masked_attention(self.model) as used:
            self.used = "replay" if used == chosen else f"replay (attention {used} in place of {chosen})"
        return answers

    @cached_property
    def matrix_peak(self) -> float:
        """Best rate of the machine's matrix products, in floating-point operations per second; measured once."""
        return matrix_peak(self.model)

    def rows_at_once(self) -> int:
        """Rows that fill the device, whatever of its memory is free; 1 where whole forwards are run."""
        from tracing.replay.replay_engine import full_budget

        return 1 if self.wanted == "plain" else self.batch_tokens or full_budget(self.model)

    def _plainly(self, asked: Sequence[Asked]) -> list[RunScores]:
        self.used = f"plain ({self._refused})" if self._refused else "plain"
        tokens = self.batch_tokens or 4096
        return [
            answer_plainly(self.model, one.question, one.cells, one.readout, batch_tokens=tokens)
            for one in asked
        ]

    def _unchecked(self, asked: Sequence[Asked]) -> list[Asked]:
        """Questions to check before these are answered: the longest, if it is longer than any before; at first also
        the shortest."""
        by_length = sorted((one for one in asked if one.cells), key=lambda one: one.question.n_pos)
        if not by_length or by_length[-1].question.n_pos <= self._checked_until:
            return []
        shortest = [] if self._checked_until or len(by_length) == 1 else by_length[:1]
        return [*shortest, by_length[-1]]

    def _check(self, asked: Asked) -> None:
        """Answer some cells both ways; CannotReplay if the answers differ by more than rounding."""
        from tracing.replay.blocks import CannotReplay, failures_refuse_replay
        from tracing.replay.replay_engine import answer_by_replay

        many = _spread(range(len(asked.cells)), _REPLAYED_CELLS)
        compared = _spread(range(len(many)), _CHECKED_CELLS)
        cells = [asked.cells[i] for i in many]
        few = asked.question.draws(slice(0, 1))
        log = replace(asked.readout, metric="logprob")
        chosen = [cells[i] for i in compared]
        plain = answer_plainly(self.model, few, chosen, log, batch_tokens=self.batch_tokens or 4096)
        with failures_refuse_replay():
            replayed = answer_by_replay(self.model, few, cells, log, batch_tokens=self.batch_tokens)
        pairs = [
            (replayed.base, plain.base),
            (replayed.other, plain.other),
            (replayed.cells[compared], plain.cells),
        ]
        worst = max(_difference(a[..., 0], b[..., 0]) for a, b in pairs if a.numel())
        allowed = _TOLERANCE.get(self.model.dtype, 1e-4)
        if worst > allowed:
            raise CannotReplay(
                f"replayed forwards differ from whole ones by {worst:.2g} nats on this architecture "
                f"(allowed {allowed:g})"
            )
        self._checked_until = max(self._checked_until, asked.question.n_pos)


def _spread(numbers: range, most: int) -> list[int]:
    """At most so many of the numbers, evenly spread, neither the first nor the last of a longer range."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[(2 * i + 1) * len(numbers) // (2 * most)] for i in range(most)]


def _difference(a: Float[Tensor, "*n"], b: Float[Tensor, "*n"]) -> float:
    """The largest absolute difference; infinite where one is finite and the other is not."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(torch.inf).max())
