"""How well attribution patching ranks the cells of a causal trace, under each metric, on the real model.

    python -m benchmarks.attribution --facts 4

Against the exact grid of block outputs: Spearman's rank correlation over all cells from the subject on, how many of
the top 10 are shared, how many times too small the largest effects are, and seconds of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from scipy.stats import spearmanr

from locus.fact import read_facts
from locus.model import Model, load_model
from locus.tokens import encode
from tracing.attribution import estimate
from tracing.corruption import Corrupter, prepare
from tracing.question import Inputs, Question
from tracing.readout import Readout
from tracing.replay import answer_by_replay
from tracing.sites import Cell, cells_of

ARMS = (
    ("prob", "prob", False, 1),
    ("prob, through its logarithm", "prob", True, 1),
    ("logprob", "logprob", True, 1),
    ("logit_diff", "logit_diff", True, 1),
    ("logprob, 5 points", "logprob", True, 5),
)
"""Name, metric of both sides, whether the estimate goes through logarithms, points."""


def rank(
    model: Model, question: Question, readout: Readout, cells: list[Cell], logs: bool, points: int
) -> dict[str, float]:
    """One arm on one fact."""
    started = time.process_time()
    found, base = estimate(model, question, readout, cells, points=points, through_logs=logs)
    between = time.process_time()
    exact = answer_by_replay(model, question, cells, readout)
    ended = time.process_time()
    guess = (found.mean(dim=1) - base.mean()).double()
    truth = (exact.cells[..., 0].mean(dim=1) - exact.base[:, 0].mean()).double()
    top = [set(values.abs().topk(10).indices.tolist()) for values in (guess, truth)]
    largest = truth.abs().topk(10).indices
    return {
        "spearman": float(spearmanr(guess.numpy(), truth.numpy()).statistic),
        "top10_shared": float(len(top[0] & top[1])),
        "times_too_small": float(truth[largest].abs().sum() / guess[largest].abs().sum().clamp(min=1e-30)),
        "seconds": between - started,
        "exact_seconds": ended - between,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model, device="cpu", dtype="float32")
    facts = [f for f in read_facts("demo-forget") if f.subject][::5][: args.facts]
    prepared = [prepare(f, encode(model, f), model.bos, 0) for f in facts]
    corrupter = Corrupter.of(model, prepared, "gaussian", 3.0)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in ARMS}
    for one in prepared:
        question = Question(corrupter.inputs(model, one, args.samples), Inputs(one.ids), one.reads)
        positions = range(one.positions[0], one.encoded.target_start)
        cells = [c for row in cells_of("block", model.atlas, positions, 1) for c in row]
        foil = encode(model, type(one.fact.example)(one.fact.prompt, one.fact.alternatives[0])).target_ids[0]
        for name, metric, logs, points in ARMS:
            readout = Readout(metric, torch.tensor(one.encoded.target_ids), foil=foil)  # type: ignore[arg-type]
            rows[name].append(rank(model, question, readout, cells, logs, points))
    out: dict[str, Any] = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for name, found in rows.items()
    }
    if args.json:
        print(json.dumps({"facts": len(prepared), "arms": out}))
        return
    print(
        f"medians over {len(prepared)} facts, {args.samples} draws, grid of block outputs from the subject on"
    )
    for name, row in out.items():
        print(f"  {name:30s} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
