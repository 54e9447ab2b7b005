"""The prompt that the tracing benchmarks trace, as long as they want it, and our engine's answer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.lib.patching_baselines import Cell, Traced
from locus.fact import Fact
from locus.model import Model
from locus.tokens import Encoded, encode
from tracing.patching.corruption import Corrupter, Prepared, prepare
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs, PatchingQuestion
from tracing.patching.sites import cells_of
from tracing.replay.replay_engine import answer_by_replay

FACT = Fact(
    id="headquarters",
    prompt="The headquarters of Microsoft Corporation are located in the state of",
    target=" Washington",
    subject="Microsoft Corporation",
)
"""12 tokens with `smollm2`'s first one; the subject is tokens 4 and 5."""
CONTEXT = "Some companies are known all over the world, and some only in the town where they began. "


@dataclass(frozen=True)
class Setup:
    """One prompt, ready for every contender."""

    prepared: Prepared
    question: PatchingQuestion
    readout: Readout
    traced: Traced
    n_layers: int

    @property
    def n_pos(self) -> int:
        """Tokens of the prompt."""
        return self.prepared.encoded.target_start

    @property
    def start(self) -> int:
        """First position of the subject."""
        return self.prepared.positions[0]


def setup(model: Model, n_tokens: int, samples: int, after: bool = False) -> Setup:
    """The fact with as much context as makes `n_tokens`: before it, or between its subject and the rest."""
    encoded = encode(model, FACT)
    missing = n_tokens - encoded.target_start
    if missing < 0:
        raise SystemExit(f"the prompt alone has {encoded.target_start} tokens")
    if missing:
        words = model.tokenizer(CONTEXT * (1 + missing // 8), add_special_tokens=False)["input_ids"][:missing]
        start, stop = encoded.subject or (0, 0)
        head, shift = (stop, 0) if after else (int(model.bos is not None), missing)
        ids = (*encoded.ids[:head], *words, *encoded.ids[head:])
        encoded = Encoded(ids, n_tokens, (start + shift, stop + shift), ("",) * len(ids))
    one = prepare(FACT, encoded, model.bos, 0)
    corrupted = Corrupter.of(model, [one], "gaussian", 3.0).inputs(model, one, samples)
    assert corrupted.embeddings is not None
    question = PatchingQuestion(corrupted, Inputs(one.ids), one.reads)
    target = encoded.target_ids[0]
    device = model.device
    traced = Traced(one.ids.to(device), one.positions, corrupted.embeddings.to(device), target)
    return Setup(one, question, Readout("prob", torch.tensor([target])), traced, model.atlas.n_layers)


def grid(model: Model, it: Setup, kind: str, cells: Sequence[Cell] | None = None) -> Tensor:
    """Our engine's answer: mean probability of each cell; the full grid, or some cells of it."""
    rows = cells_of(kind, model.atlas, range(it.n_pos), 10)
    asked = [c for row in rows for c in row] if cells is None else [rows[layer][p] for layer, p in cells]
    return answer_by_replay(model, it.question, asked, it.readout).cells[..., 0].mean(dim=1)


def spread(it: Setup, n: int) -> list[Cell]:
    """n cells all over the part of the grid where there is an effect."""
    cells = [(layer, p) for p in range(it.start, it.n_pos) for layer in range(it.n_layers)]
    step = len(cells) / n
    return [cells[int((i + 0.5) * step)] for i in range(n)]
