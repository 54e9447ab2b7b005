"""Which engine answers: replay where the model can be replayed, whole forwards where it cannot.

The first question an `Engine` gets is also a test: a few of its cells are answered both ways, and if the two
differ the plain engine takes over for good, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

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
    _checked: bool = field(default=False, init=False)
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
        from tracing.replay.blocks import attention_of, masked_attention
        from tracing.replay.replay_engine import CannotReplay, answer_together

        try:
            if not self._checked:
                self._check(asked[0])
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

    def _check(self, asked: Asked) -> None:
        """Answer some cells both ways; CannotReplay if the answers differ by more than rounding."""
        from tracing.replay.replay_engine import CannotReplay, answer_by_replay

        step = max(1, len(asked.cells) // _CHECKED_CELLS)
        some = list(asked.cells[step // 2 :: step][:_CHECKED_CELLS])
        few = asked.question.draws(slice(0, 1))
        log = replace(asked.readout, metric="logprob")
        replayed = answer_by_replay(self.model, few, some, log, batch_tokens=self.batch_tokens)
        plain = answer_plainly(self.model, few, some, log, batch_tokens=self.batch_tokens or 4096)
        pairs = [(replayed.base, plain.base), (replayed.other, plain.other), (replayed.cells, plain.cells)]
        worst = max(float((a[..., 0] - b[..., 0]).abs().nan_to_num(0.0).max()) for a, b in pairs if a.numel())
        allowed = _TOLERANCE.get(self.model.dtype, 1e-4)
        if worst > allowed:
            raise CannotReplay(
                f"replayed forwards differ from whole ones by {worst:.2g} nats on this architecture "
                f"(allowed {allowed:g})"
            )
        self._checked = True
