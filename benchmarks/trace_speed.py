"""How fast causal tracing is: our engine beside ROME's loop, TransformerLens, naive batching, and the arithmetic.

    python -m benchmarks.trace_speed --quick --json

One process, one run: the contenders take turns, each round gives a ratio, and the medians of the rounds are
printed. Before any figure is printed all must have given the same probabilities. Contenders that take minutes a
grid are timed on cells spread over the grid and multiplied (every cell of theirs is the same forward); ours is
always timed on the full grid, recording included.

The necessary arithmetic is what the grid cannot do without: matrix products of the rows that a patch changes,
the keys and values of the last block, and one unembedding a cell and draw, timed as bare products of the same
shapes, 400 rows at a time (attention, norms, activations and the softmax are not counted).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not __package__:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.patching_baselines import Cell, Traced, naive_cells, rome_cell, transformer_lens_cells
from locus.fact import Fact
from locus.model import Model, load_model
from locus.tokens import Encoded, encode
from tracing.corruption import Corrupter, Prepared, prepare
from tracing.plain import answer_plainly
from tracing.question import Inputs, Question
from tracing.readout import Readout
from tracing.replay import answer_by_replay
from tracing.sites import cells_of

FACT = Fact(
    id="headquarters",
    prompt="The headquarters of Microsoft Corporation are located in the state of",
    target=" Washington",
    subject="Microsoft Corporation",
)
"""12 tokens with `smollm2`'s first one; the subject is tokens 4 and 5."""
CONTEXT = "Some companies are known all over the world, and some only in the town where they began. "
CHUNK_ROWS = 400
CHUNK_SIZES = (1, 2, 4, 8, 16)
CHUNK_TOKENS = 4096
"""Naive batches beyond this many tokens are not tried: all their logits would take gigabytes."""


class Clock:
    """Seconds of work: the processor's own count with one thread (other programs do not disturb it), else wall time."""

    def __init__(self, model: Model) -> None:
        self.cuda = model.device.type == "cuda"
        self.name = "wall" if self.cuda or torch.get_num_threads() > 1 else "cpu"

    def __call__(self, work: Callable[[], object]) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter if self.name == "wall" else time.process_time
        started = now()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return now() - started


@dataclasses.dataclass(frozen=True)
class Setup:
    """One prompt, ready for every contender."""

    prepared: Prepared
    question: Question
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


def setup(model: Model, n_tokens: int, samples: int) -> Setup:
    """The fact behind as much context as makes `n_tokens`."""
    encoded = encode(model, FACT)
    missing = n_tokens - encoded.target_start
    if missing < 0:
        raise SystemExit(f"the prompt alone has {encoded.target_start} tokens")
    if missing:
        words = model.tokenizer(CONTEXT * (1 + missing // 8), add_special_tokens=False)["input_ids"][:missing]
        head = int(model.bos is not None)
        ids = (*encoded.ids[:head], *words, *encoded.ids[head:])
        start, stop = encoded.subject or (0, 0)
        encoded = Encoded(ids, n_tokens, (start + missing, stop + missing), ("",) * len(ids))
    one = prepare(FACT, encoded, model.bos, 0)
    corrupted = Corrupter.of(model, [one], "gaussian", 3.0).inputs(model, one, samples)
    assert corrupted.embeddings is not None
    question = Question(corrupted, Inputs(one.ids), one.reads)
    target = encoded.target_ids[0]
    device = model.device
    traced = Traced(one.ids.to(device), one.positions, corrupted.embeddings.to(device), target)
    return Setup(one, question, Readout("prob", torch.tensor([target])), traced, model.atlas.n_layers)


def grid(model: Model, it: Setup, kind: str, cells: Sequence[Cell] | None = None) -> Tensor:
    """Our engine's answer: mean probability of each cell; the full grid, or some cells of it."""
    rows = cells_of(kind, model.atlas, range(it.n_pos), 10)
    asked = [c for row in rows for c in row] if cells is None else [rows[layer][p] for layer, p in cells]
    return answer_by_replay(model, it.question, asked, it.readout).cells[..., 0].mean(dim=1)


def plain_seconds(model: Model, it: Setup, kind: str, cells: Sequence[Cell], clock: Clock) -> float:
    """Seconds a cell of the plain engine, several cells in a forward."""
    rows = cells_of(kind, model.atlas, range(it.n_pos), 10)
    asked = [rows[layer][p] for layer, p in cells]
    tokens = 8 * it.n_pos * it.question.samples
    both = clock(lambda: answer_plainly(model, it.question, asked, it.readout, batch_tokens=tokens))
    none = clock(lambda: answer_plainly(model, it.question, [], it.readout))
    return (both - none) / len(cells)


def necessary_flops(model: Model, it: Setup) -> dict[tuple[int, int], float]:
    """(in, out) of each weight shape -> rows that must go through it for a grid of block outputs.

    For a patch at (l, t): rows t to the end (one fewer where the first corrupted token is restored) through blocks
    l + 1 to the last but one; of the last block all rows' keys and values, and the rest for the last row alone.
    """
    atlas, samples = model.atlas, it.question.samples
    rows, last_rows, last_only = 0, 0, 0
    for position in range(it.start, it.n_pos):
        n = it.n_pos - position - (position == it.start)
        if n == 0:
            continue
        entered = atlas.n_layers - 1  # layers l = 0 … L - 2 go through the last block
        rows += n * (atlas.n_layers - 2) * (atlas.n_layers - 1) // 2
        last_rows += n * entered
        last_only += entered
    n_read = last_only + 1
    shapes: dict[tuple[int, int], float] = {}

    def add(width_in: int, width_out: int, count: float) -> None:
        shapes[width_in, width_out] = shapes.get((width_in, width_out), 0.0) + count * samples

    d, kv, z = atlas.d_model, atlas.n_kv_heads * atlas.d_head, atlas.n_heads * atlas.d_head
    gates = sum(part.role in ("gate", "up") for part in atlas.neurons[0])
    for count, keys in ((rows + it.n_pos * atlas.n_layers / samples, None), (last_only, last_rows)):
        add(d, z, count)
        add(d, kv, 2 * (keys if keys is not None else count))
        add(z, d, count)
        add(d, atlas.d_mlp, gates * count)
        add(atlas.d_mlp, d, count)
    add(d, atlas.d_vocab, n_read)
    return shapes


def floor_seconds(model: Model, shapes: dict[tuple[int, int], float], clock: Clock) -> tuple[float, float]:
    """Seconds of the bare products, and the best rate of any of the shapes in FLOP/s."""
    total, best = 0.0, 0.0
    for (width_in, width_out), rows in shapes.items():
        n_rows = CHUNK_ROWS if model.device.type == "cpu" else 4096
        x = torch.randn(n_rows, width_in, dtype=model.dtype, device=model.device)
        w = torch.randn(width_out, width_in, dtype=model.dtype, device=model.device)
        times = max(1, int((2e9 if model.device.type == "cpu" else 2e12) / (n_rows * width_in * width_out)))
        F.linear(x, w)
        seconds = clock(lambda x=x, w=w, times=times: [F.linear(x, w) for _ in range(times)]) / times
        total += rows / n_rows * seconds
        best = max(best, 2 * n_rows * width_in * width_out / seconds)
    return total, best


def check(model: Model, it: Setup, cells: Sequence[Cell], exact: bool) -> dict[str, float]:
    """All contenders give the same probabilities; with `exact`, ours is as near to float64 as whole forwards are.

    Raises:
        SystemExit: they do not.
    """
    ours = grid(model, it, "block", cells).double()
    others = {
        "rome": torch.tensor([rome_cell(model, it.traced, c) for c in cells]).double(),
        "naive": torch.tensor(naive_cells(model, it.traced, False)(cells)).double(),
        "transformer_lens": torch.tensor(transformer_lens_cells(model, it.traced)(cells)).double(),
    }
    allowed = 3e-5 if model.dtype == torch.float32 else 0.1
    found = {f"{name}_relative": float(((ours - p).abs() / p).max()) for name, p in others.items()}
    if exact:
        rows = cells_of("block", model.atlas, range(it.n_pos), 10)
        asked = [rows[layer][p] for layer, p in cells]
        plain = answer_plainly(model, it.question, asked, it.readout).cells[..., 0].mean(dim=1).double()
        model.module.double()
        truth = torch.tensor([rome_cell(model, it.traced, c) for c in cells]).double()
        model.module.float()
        found["ours_from_float64"] = float(((ours - truth).abs() / truth).max())
        found["plain_from_float64"] = float(((plain - truth).abs() / truth).max())
        found["rome_from_float64"] = float(((others["rome"] - truth).abs() / truth).max())
    wrong = {name: d for name, d in found.items() if not d <= allowed}
    if wrong:
        raise SystemExit(f"the answers differ (allowed {allowed:g} relative): {wrong}; no figures")
    return found


def spread(it: Setup, n: int) -> list[Cell]:
    """n cells all over the part of the grid where there is an effect."""
    cells = [(layer, p) for p in range(it.start, it.n_pos) for layer in range(it.n_layers)]
    step = len(cells) / n
    return [cells[int((i + 0.5) * step)] for i in range(n)]


def peak_megabytes(work: Callable[[], object]) -> float | None:
    """Most resident memory during the work above what there was before it; None where Linux does not count it."""

    def high_water() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3

    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
    except (OSError, StopIteration):
        return None
    work()
    return high_water() - before


def best_chunk(
    answer: Callable[[Sequence[Cell]], object], cells: Sequence[Cell], sizes: Sequence[int], clock: Clock
) -> int:
    """Cells in one forward at which a cell takes least; each size tried once after a warm-up."""
    answer(cells[:1])
    return min(sizes, key=lambda k: clock(lambda: answer(cells[:k])) / k)


def compare(model: Model, it: Setup, rounds: int, n_cells: int, exact: bool) -> dict[str, Any]:
    """The contenders in turns; medians over the rounds."""
    clock = Clock(model)
    agreement = check(model, it, spread(it, 12 if exact else 4), exact)
    cells = spread(it, n_cells)
    n_grid = it.n_layers * it.n_pos
    n_effect = it.n_layers * (it.n_pos - it.start)
    lens = transformer_lens_cells(model, it.traced)
    naive = {flag: naive_cells(model, it.traced, flag) for flag in (False, True)}
    most = CHUNK_TOKENS // (it.n_pos * it.question.samples)
    sizes = [k for k in CHUNK_SIZES if k <= max(1, most)]
    sixteen = spread(it, max(sizes))
    chunk = {flag: best_chunk(answer, sixteen, sizes, clock) for flag, answer in naive.items()}
    shapes = necessary_flops(model, it)
    flops = sum(2 * a * b * rows for (a, b), rows in shapes.items())
    grid(model, it, "block", spread(it, 2))  # warm
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        row = {"ours": clock(lambda: grid(model, it, "block"))}
        row["floor"], row["peak_flops"] = floor_seconds(model, shapes, clock)
        row["rome"] = clock(lambda: [rome_cell(model, it.traced, c) for c in cells]) / len(cells) * n_grid
        row["rome_skipping"] = row["rome"] * n_effect / n_grid
        row["transformer_lens"] = clock(lambda: lens(cells[:2])) / 2 * n_grid
        for flag, name in ((False, "naive"), (True, "naive_last_logits")):
            work = sixteen[: chunk[flag]]
            row[name] = clock(lambda flag=flag, work=work: naive[flag](work)) / len(work) * n_grid
        seen.append(row)
    seconds = {name: statistics.median(r[name] for r in seen) for name in seen[0] if name != "peak_flops"}
    ratios = {
        f"speedup_over_{name}": statistics.median(r[name] / r["ours"] for r in seen)
        for name in ("rome", "rome_skipping", "transformer_lens", "naive", "naive_last_logits")
    }
    return {
        "tokens": it.n_pos,
        "subject_starts_at": it.start,
        "layers": it.n_layers,
        "samples": it.question.samples,
        "seconds": seconds,
        **ratios,
        "fraction_of_floor": statistics.median(r["floor"] / r["ours"] for r in seen),
        "necessary_gflop": flops / 1e9,
        "peak_gflops": statistics.median(r["peak_flops"] for r in seen) / 1e9,
        "naive_chunk": chunk[False],
        "peak_megabytes": {
            "ours": peak_megabytes(lambda: grid(model, it, "block", spread(it, 60))),
            "naive": peak_megabytes(lambda: naive[False](sixteen[: chunk[False]])),
        },
        "clock": clock.name,
        "rounds": rounds,
        "agreement": agreement,
    }


def windows(model: Model, it: Setup, rounds: int) -> dict[str, float]:
    """Speed-up over batched whole forwards of the kinds that patch inside blocks; whole grids of ours."""
    clock, out = Clock(model), {}
    for kind in ("mlp", "attn", "block-no-mlp", "block-no-attn"):
        ratios = []
        for _ in range(rounds):
            ours = clock(lambda kind=kind: grid(model, it, kind))
            theirs = plain_seconds(model, it, kind, spread(it, 8), clock) * it.n_layers * it.n_pos
            ratios.append(theirs / ours)
        out[f"speedup_over_naive_last_logits_{kind}"] = statistics.median(ratios)
    return out


def random_model(size: str) -> Model:
    """A Llama-shaped random model in bfloat16 on the GPU, with `smollm2`'s tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from locus.model import wrap

    small = load_model("smollm2")
    shape = {
        "1B": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
        },
        "7B": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    }[size]
    config = AutoConfig.for_model(
        "llama", **shape, num_key_value_heads=8 if size == "1B" else 32, vocab_size=small.atlas.d_vocab
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return wrap(module, small.tokenizer, name=f"random {size}", bos=small.bos)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="12 tokens only, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="prompt lengths (12 48 128)")
    parser.add_argument("--samples", type=int, nargs="+", default=None, help="draws (10)")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--windows", action="store_true", help="also time MLP and attention windows, severed variants"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (2 if args.quick else 5)
    lengths = args.tokens or ([12] if args.quick else [12, 48, 128])
    model = load_model(args.model, device="cpu", dtype="float32")
    result: dict[str, Any] = {"model": model.name, "threads": args.threads, **machine(), "sizes": []}
    for n_tokens in lengths:
        for samples in args.samples or [10]:
            it = setup(model, n_tokens, samples)
            n_cells = 4 if n_tokens <= 16 else 2
            figures = compare(model, it, rounds, n_cells, exact=n_tokens <= 16 and not args.quick)
            if args.windows and n_tokens <= 16:
                figures |= windows(model, it, max(1, rounds // 2))
            result["sizes"].append(figures)
            if not args.json:
                show(figures)
    result["cuda"] = (
        cuda(rounds) if torch.cuda.is_available() else "no GPU here: the 1B and 7B sizes were not run"
    )
    first = result["sizes"][0]
    keys = ("speedup_over_rome", "speedup_over_naive", "fraction_of_floor", "speedup_over_transformer_lens")
    result |= {key: first[key] for key in keys}
    if args.json:
        print(json.dumps(result))
    else:
        print(result["cuda"], file=sys.stderr)


def cuda(rounds: int) -> dict[str, Any]:
    """The same comparison on the GPU, random models in bfloat16."""
    out = {}
    for size in ("1B", "7B"):
        model = random_model(size)
        it = setup(model, 12, 10)
        out[size] = compare(model, it, rounds, 4, exact=False)
        del model
        torch.cuda.empty_cache()
    return out


def machine() -> dict[str, Any]:
    """Where and when."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": load,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def show(figures: dict[str, Any]) -> None:
    """One size, for people."""
    head = f"{figures['tokens']} tokens, subject from token {figures['subject_starts_at']}, {figures['samples']} draws"
    print(f"{head} ({figures['clock']} seconds, medians of {figures['rounds']})")
    for name, seconds in figures["seconds"].items():
        ratio = figures.get(f"speedup_over_{name}")
        print(f"  {name:20s} {seconds:10.1f} s" + (f"   ours is {ratio:.1f} times faster" if ratio else ""))
    print(f"  fraction of the necessary arithmetic's speed: {figures['fraction_of_floor']:.2f}")
    for key, value in figures.items():
        if key.startswith("speedup_over_naive_last_logits_"):
            print(f"  {key}: {value:.1f}")
    print(f"  peak memory in megabytes above the model's: {figures['peak_megabytes']}")
    print(f"  agreement: {figures['agreement']}", flush=True)


if __name__ == "__main__":
    main()
