"""How far traced probabilities are from whole forwards, and both from float64: every kind, every corruption.

    python -m benchmarks.trace_exactness --cells 4

SmolLM2's real weights in float32, facts of `demo-forget`, cells drawn all over the grids. Ends with an error if a
probability of ours is further than 3e-5 relative from whole forwards, or further from a float64 run than whole
float32 forwards are, up to the rounding of a single operation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locus.fact import Fact, read_facts
from locus.model import Model, load_model
from locus.tokens import encode
from tracing.patching.corruption import CORRUPTIONS, Corrupter, Prepared, prepare
from tracing.patching.plain_engine import answer_plainly
from tracing.patching.readout import Readout
from tracing.patching.runs import Asked, Inputs, PatchingQuestion
from tracing.patching.sites import KINDS, PatchedRun, cells_of
from tracing.replay.replay_engine import answer_by_replay

ALL_KINDS = (*KINDS, "head:4", "query:4", "key:1", "value:1")
ALLOWED = 3e-5
"""Relative: what float32 rounding comes to in 30 layers."""


@dataclass(frozen=True)
class Distances:
    """Largest relative distances of probabilities, over cells and draws."""

    ours_from_plain: float
    ours_from_float64: float
    plain_from_float64: float


def questions(
    model: Model, facts: Sequence[Fact], samples: int, n_cells: int, seed: int
) -> dict[str, list[Asked]]:
    """For each corruption, each direction: cells of every kind of one fact, drawn at random."""
    prepared = [prepare(fact, encode(model, fact), model.bos, 0) for fact in facts]
    lengths = [one.encoded.target_start for one in prepared]
    one = next(one for one in prepared if one.encoded.subject and lengths.count(one.encoded.target_start) > 1)
    generator = torch.Generator().manual_seed(seed)
    readout = Readout("prob", torch.tensor(one.encoded.target_ids))
    out: dict[str, list[Asked]] = {}
    for corruption in CORRUPTIONS:
        corrupted = Corrupter.of(model, prepared, corruption, 3.0).inputs(model, one, samples)
        question = PatchingQuestion(corrupted, Inputs(one.ids), one.reads)
        out[corruption] = [
            Asked(asked, drawn_cells(model, one, n_cells, generator), readout)
            for asked in (question, question.reversed())
        ]
    return out


def drawn_cells(model: Model, one: Prepared, n: int, generator: torch.Generator) -> list[PatchedRun]:
    """n cells of each kind, from the subject on."""
    cells = []
    for kind in ALL_KINDS:
        rows = cells_of(kind, model.atlas, range(one.positions[0], one.encoded.target_start), 10)
        for _ in range(n):
            layer, column = (
                int(torch.randint(k, (1,), generator=generator)) for k in (len(rows), len(rows[0]))
            )
            cells.append(rows[layer][column])
    return cells


def distances(model: Model, asked: Sequence[Asked]) -> Distances:
    """Ours, whole forwards, and whole forwards in float64; the model comes back in float32."""
    ours = torch.cat([flat(answer_by_replay(model, a.question, a.cells, a.readout).cells) for a in asked])
    plain = torch.cat([flat(answer_plainly(model, a.question, a.cells, a.readout).cells) for a in asked])
    model.module.double()
    try:
        truth = torch.cat([flat(answer_plainly(model, a.question, a.cells, a.readout).cells) for a in asked])
    finally:
        model.module.float()

    def far(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs() / b).max())

    return Distances(far(ours, plain), far(ours, truth), far(plain, truth))


def flat(cells: Tensor) -> Tensor:
    """Probabilities of all cells and draws."""
    return cells[..., 0].flatten().double()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cells", type=int, default=4, help="of each kind, for each corruption and direction"
    )
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("smollm2", device="cpu", dtype="float32")
    facts = read_facts("demo-forget")
    found: dict[str, Any] = {}
    for corruption, asked in questions(model, facts, args.samples, args.cells, args.seed).items():
        worst = distances(model, asked)
        found[corruption] = vars(worst)
        if not args.json:
            print(
                corruption,
                *(f"{name} {value:.2e}" for name, value in vars(worst).items()),
                sep="  ",
                flush=True,
            )
        if worst.ours_from_plain > ALLOWED or worst.ours_from_float64 > max(
            ALLOWED, 2 * worst.plain_from_float64
        ):
            raise SystemExit(f"{corruption}: the answers differ by more than rounding")
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
