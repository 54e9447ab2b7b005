"""How well attribution patching ranks the cells of a causal trace, under each metric, on the real model.

    python -m benchmarks.attribution --facts 4
    python -m benchmarks.attribution --facts 2 --heads 0 4 8

Against the exact grid of block outputs, or of single heads' queries and keys with and without the attention fix of
AtP*: Spearman's rank correlation over all cells from the subject on, how many of the top 10 are shared, how many times
too small the largest effects are, and seconds of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr

from locus.fact import read_facts
from locus.model import Model, load_model
from locus.tokens import encode
from tracing.patching.attribution import estimate
from tracing.patching.corruption import Corrupter, prepare
from tracing.patching.readout import Metric, Readout
from tracing.patching.runs import Inputs, PatchingQuestion, RunScores
from tracing.patching.sites import PatchedRun, cells_of
from tracing.replay.replay_engine import answer_by_replay


@dataclass(frozen=True)
class Arm:
    """One way to estimate, of one grid."""

    name: str
    kinds: tuple[str, ...]
    metric: Metric
    through_logs: bool = True
    points: int = 1
    fix_attention: bool = True


BLOCKS = (
    Arm("prob", ("block",), "prob", through_logs=False),
    Arm("prob, through its logarithm", ("block",), "prob"),
    Arm("logprob", ("block",), "logprob"),
    Arm("logit_diff", ("block",), "logit_diff"),
    Arm("logprob, 5 points", ("block",), "logprob", points=5),
)


def head_arms(heads: list[int], n_kv_heads: int) -> list[Arm]:
    """Queries and keys of some heads, with and without the fix."""
    kinds = {
        "queries": tuple(f"query:{h}" for h in heads),
        "keys": tuple(f"key:{h}" for h in heads if h < n_kv_heads),
    }
    return [
        Arm(f"{name}, {'fixed' if fix else 'plain'}", of, "logprob", fix_attention=fix)
        for name, of in kinds.items()
        for fix in (False, True)
        if of
    ]


def rank(
    model: Model,
    question: PatchingQuestion,
    readout: Readout,
    cells: list[PatchedRun],
    arm: Arm,
    exact: RunScores,
) -> dict[str, float]:
    """One arm on one fact."""
    started = time.process_time()
    found, base = estimate(
        model,
        question,
        readout,
        cells,
        points=arm.points,
        through_logs=arm.through_logs,
        fix_attention=arm.fix_attention,
    )
    seconds = time.process_time() - started
    guess = (found.mean(dim=1) - base.mean()).double()
    truth = (exact.cells[..., 0].mean(dim=1) - exact.base[:, 0].mean()).double()
    top = [set(values.abs().topk(10).indices.tolist()) for values in (guess, truth)]
    largest = truth.abs().topk(10).indices
    return {
        "spearman": float(spearmanr(guess.numpy(), truth.numpy()).statistic),
        "top10_shared": float(len(top[0] & top[1])),
        "times_too_small": float(truth[largest].abs().sum() / guess[largest].abs().sum().clamp(min=1e-30)),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument(
        "--heads", type=int, nargs="+", help="queries and keys of these heads, instead of blocks"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(args.model, device="cpu", dtype="float32")
    facts = [f for f in read_facts("demo-forget") if f.subject][::5][: args.facts]
    prepared = [prepare(f, encode(model, f), model.bos, 0) for f in facts]
    corrupter = Corrupter.of(model, prepared, "gaussian", 3.0)
    arms = head_arms(args.heads, model.atlas.n_kv_heads) if args.heads else list(BLOCKS)
    rows: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in arms}
    for one in prepared:
        question = PatchingQuestion(corrupter.inputs(model, one, args.samples), Inputs(one.ids), one.reads)
        positions = range(one.positions[0], one.encoded.target_start)
        foil = encode(model, type(one.fact.example)(one.fact.prompt, one.fact.alternatives[0])).target_ids[0]
        known: dict[tuple[tuple[str, ...], str], RunScores] = {}
        for arm in arms:
            cells = [c for k in arm.kinds for row in cells_of(k, model.atlas, positions, 1) for c in row]
            readout = Readout(arm.metric, torch.tensor(one.encoded.target_ids), foil=foil)
            if (arm.kinds, arm.metric) not in known:
                known[arm.kinds, arm.metric] = answer_by_replay(model, question, cells, readout)
            rows[arm.name].append(rank(model, question, readout, cells, arm, known[arm.kinds, arm.metric]))
    out: dict[str, Any] = {
        name: {key: statistics.median(r[key] for r in found) for key in found[0]}
        for name, found in rows.items()
    }
    if args.json:
        print(json.dumps({"facts": len(prepared), "arms": out}))
        return
    print(f"medians over {len(prepared)} facts, {args.samples} draws, positions from the subject on")
    for name, row in out.items():
        print(f"  {name:30s} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
