"""How fast causal tracing is: our engine beside ROME's loop, TransformerLens, naive batching, and the arithmetic.

    python -m benchmarks.trace_speed --quick --json

One process, one run: the contenders take turns, each round gives a ratio, and the medians of the rounds are
printed. Before any figure is printed all must have given the same probabilities. Contenders that take minutes a
grid are timed on cells spread over the grid and multiplied (every cell of theirs is the same forward); ours is
always timed on the full grid, recording included.

The necessary arithmetic is what the grid cannot do without (`benchmarks.lib.arithmetic`). How time grows with layers,
tokens and draws: `benchmarks.trace_growth`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.lib.arithmetic import Clock, floor_seconds, machine, necessary_flops, peak_megabytes
from benchmarks.lib.patching_baselines import Cell, naive_cells, rome_cell, transformer_lens_cells
from benchmarks.lib.traced_prompt import Setup, grid, setup, spread
from locus.model import Model, load_model
from tracing.patching.plain_engine import answer_plainly
from tracing.patching.sites import cells_of

CHUNK_SIZES = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 4, 16, 64, 256)}
"""Cells in one forward that naive batching tries."""
CHUNK_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Naive batches beyond this many tokens are not tried: all their logits would take gigabytes."""
KINDS = ("mlp", "attn", "block-no-mlp", "block-no-attn")
"""Kinds beside block outputs."""


def plain_seconds(model: Model, it: Setup, kind: str, cells: Sequence[Cell], clock: Clock) -> float:
    """Seconds a cell of the plain engine, several cells in a forward."""
    rows = cells_of(kind, model.atlas, range(it.n_pos), 10)
    asked = [rows[layer][p] for layer, p in cells]
    tokens = 8 * it.n_pos * it.question.samples
    both = clock(lambda: answer_plainly(model, it.question, asked, it.readout, batch_tokens=tokens))
    none = clock(lambda: answer_plainly(model, it.question, [], it.readout))
    return (both - none) / len(cells)


def check(
    model: Model,
    it: Setup,
    cells: Sequence[Cell],
    exact: bool,
    lens: Callable[[Sequence[Cell]], list[float]] | None,
) -> dict[str, float]:
    """All contenders give the same probabilities; with `exact`, ours is as near to float64 as whole forwards are.

    Raises:
        SystemExit: they do not.
    """
    ours = grid(model, it, "block", cells).double()
    others = {
        "rome": torch.tensor([rome_cell(model, it.traced, c) for c in cells]).double(),
        "naive": torch.tensor(naive_cells(model, it.traced, False)(cells)).double(),
    }
    if lens is not None:
        others["transformer_lens"] = torch.tensor(lens(cells)).double()
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


def best_chunk(
    answer: Callable[[Sequence[Cell]], object], cells: Sequence[Cell], sizes: Sequence[int], clock: Clock
) -> int:
    """Cells in one forward at which a cell takes least; each size tried once after a warm-up."""
    answer(cells[:1])
    return min(sizes, key=lambda k: clock(lambda: answer(cells[:k])) / k)


def compare(
    model: Model, it: Setup, rounds: int, n_cells: int, exact: bool, with_lens: bool = True
) -> dict[str, Any]:
    """The contenders in turns; medians over the rounds. Without `with_lens` no bridge (a second copy of the model)."""
    clock, device = Clock(model), model.device.type
    lens = transformer_lens_cells(model, it.traced) if with_lens else None
    agreement = check(model, it, spread(it, 12 if exact else 4), exact, lens)
    cells = spread(it, n_cells)
    n_grid = it.n_layers * it.n_pos
    n_effect = it.n_layers * (it.n_pos - it.start)
    naive = {flag: naive_cells(model, it.traced, flag) for flag in (False, True)}
    most = CHUNK_TOKENS[device] // (it.n_pos * it.question.samples)
    sizes = [k for k in CHUNK_SIZES[device] if k <= max(1, most)]
    many = spread(it, max(sizes))
    chunk = {flag: best_chunk(answer, many, sizes, clock) for flag, answer in naive.items()}
    shapes = necessary_flops(model, it)
    flops = sum(2 * a * b * rows for (a, b), rows in shapes.items())
    grid(model, it, "block", spread(it, 2))  # warm
    seen: list[dict[str, float]] = []
    for _ in range(rounds):
        row = {"ours": clock(lambda: grid(model, it, "block"))}
        row["floor"], row["peak_flops"] = floor_seconds(model, shapes, clock)
        row["rome"] = clock(lambda: [rome_cell(model, it.traced, c) for c in cells]) / len(cells) * n_grid
        row["rome_skipping"] = row["rome"] * n_effect / n_grid
        if lens is not None:
            row["transformer_lens"] = clock(lambda: lens(cells[:2])) / 2 * n_grid
        for flag, name in ((False, "naive"), (True, "naive_last_logits")):
            work = many[: chunk[flag]]
            row[name] = clock(partial(naive[flag], work)) / len(work) * n_grid
        seen.append(row)
    seconds = {name: statistics.median(r[name] for r in seen) for name in seen[0] if name != "peak_flops"}
    ratios = {
        f"speedup_over_{name}": statistics.median(r[name] / r["ours"] for r in seen)
        for name in seconds
        if name not in ("ours", "floor")
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
        "naive_last_logits_chunk": chunk[True],
        "peak_megabytes": {
            "ours": peak_megabytes(lambda: grid(model, it, "block")),
            "naive": peak_megabytes(lambda: naive[False](many[: chunk[False]])),
            "naive_last_logits": peak_megabytes(lambda: naive[True](many[: chunk[True]])),
        },
        "clock": clock.name,
        "rounds": rounds,
        "agreement": agreement,
    }


def windows(model: Model, it: Setup, rounds: int) -> dict[str, float]:
    """Speed-up over batched whole forwards of the kinds that patch inside blocks; whole grids of ours."""
    clock, out = Clock(model), {}
    for kind in KINDS:
        ratios = []
        for _ in range(rounds):
            ours = clock(partial(grid, model, it, kind))
            theirs = plain_seconds(model, it, kind, spread(it, 8), clock) * it.n_layers * it.n_pos
            ratios.append(theirs / ours)
        out[f"speedup_over_naive_last_logits_{kind}"] = statistics.median(ratios)
    return out


def random_model(size: str) -> Model:
    """A Llama-shaped random model in bfloat16 on the GPU, with `smollm2`'s tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from locus.model import wrap

    small = load_model("smollm2", device="cpu")
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
    result |= {key: first[key] for key in ("speedup_over_rome", "speedup_over_naive", "fraction_of_floor")}
    if args.json:
        print(json.dumps(result))
    else:
        print(result["cuda"], file=sys.stderr)


def cuda(rounds: int) -> dict[str, Any]:
    """The same comparison on the GPU, random models in bfloat16; a bridge's second copy only of the smaller one."""
    out = {}
    for size in ("1B", "7B"):
        model = random_model(size)
        it = setup(model, 12, 10)
        out[size] = compare(model, it, rounds, 4, exact=False, with_lens=size == "1B")
        out[size]["fraction_of_matrix_peak"] = (
            out[size]["necessary_gflop"] / out[size]["seconds"]["ours"] / out[size]["peak_gflops"]
        )
        del model
        torch.cuda.empty_cache()
    return out


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
