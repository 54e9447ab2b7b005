"""Memory of weight-level saliency: weights, one gradient, a bit a weight, and work space that does not grow.

    python -m benchmarks.weight_memory                      a Llama of 7B's proportions at a quarter of its width
    python -m benchmarks.weight_memory --width 512 --layers 4 --scores gradient

A random model in bfloat16 scores every weight on one fact and cuts out the best 1 %. Resident memory is read from the
kernel: its highest value from the moment the model is there. Beside it stands the estimate: bytes of the gradients
that a score must hold, of the mask as it is kept, and the largest single tensor (a gradient is added to
another; a tensor's choices are a byte a weight before they are packed). The mask is asserted to hold exactly the
budget, and, against a full sort on the smallest run, exactly the best.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from locus.model import Model, wrap
from tracing.localizers.weight_saliency import CONTRASTS, Score, WeightSaliency

BUDGET = 0.01
PROPORTIONS = {"intermediate_size": 11008 / 4096, "num_attention_heads": 32 / 4096}
"""Of Llama-2-7B's width; its vocabulary is kept in proportion too."""
VOCABULARY = 32000 / 4096


def model_of(width: int, layers: int) -> Model:
    """A random Llama in bfloat16, never larger in memory than it ends."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {name: int(width * ratio) for name, ratio in PROPORTIONS.items()}
    shape |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_key_value_heads=int(width * PROPORTIONS["num_attention_heads"]),
        vocab_size=max(int(width * VOCABULARY), len(tokenizer)),
        max_position_embeddings=256,
        dtype=torch.bfloat16,
        **shape,
    )
    torch.set_default_dtype(torch.bfloat16)
    module = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return wrap(module, tokenizer, name="random")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(width: int, layers: int, score: Score, groups: int, check: bool) -> dict[str, Any]:
    """Locate once, in this process."""
    from tests.tiny import tiny_facts

    torch.set_num_threads(1)
    model = model_of(width, layers)
    facts = tiny_facts()
    sizes = [p.numel() * p.element_size() for p in model.module.parameters()]
    n_weights = sum(p.numel() for p in model.module.parameters())
    localizer = WeightSaliency(score=score, groups=groups)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    start = time.process_time()
    scores = localizer.run(model, facts[:1], facts[1:2])
    located, gone = resident("VmHWM"), time.process_time()
    mask = scores.top(BUDGET)
    peak, end = resident("VmHWM"), time.process_time()
    assert mask.n_weights == round(BUDGET * n_weights)
    if check:
        flat = torch.cat([tensor.float().flatten() for tensor in scores.values.values()])
        threshold = flat.sort(descending=True).values[mask.n_weights - 1]
        lowest = min(float(s.take(scores.values[name]).min()) for name, s in mask.entries.items())
        assert lowest == float(threshold)
    kept = sum(data.nbytes for s in mask.entries.values() if (data := s.stored()[1]) is not None)
    two = score in (*CONTRASTS, "fisher")
    return {
        "weights": n_weights,
        "weight_bytes": sum(sizes),
        "gradients": sum(sizes) + (-(-sum(sizes) // groups) if two else 0),
        "mask": kept,
        "largest": max(sizes),
        "located": located - before,
        "peak": peak - before,
        "seconds": [gone - start, end - gone],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every score in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scores", nargs="+", choices=get_args(Score), default=list(get_args(Score)))
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--check", action="store_true", help="compare with a full sort (takes its memory)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.width, args.layers, args.scores[0], args.groups[0], args.check)))
        return
    print(
        "| score | groups | weights | gradients | mask | beyond the weights, at most | bits a weight of the mask | s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for score in args.scores:
        for groups in args.groups if score in (*CONTRASTS, "fisher") else args.groups[:1]:
            command = [sys.executable, "-m", "benchmarks.weight_memory", "--one", "--scores", score]
            command += ["--width", str(args.width), "--layers", str(args.layers), "--groups", str(groups)]
            command += ["--check"] if args.check else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            one = json.loads(done.stdout.splitlines()[-1])
            shown = [f"{one[key] / 1e6:,.0f} MB" for key in ("weight_bytes", "gradients", "mask", "peak")]
            bits = 8 * one["mask"] / one["weights"]
            seconds = " + ".join(f"{s:.1f}" for s in one["seconds"])
            print(f"| {score} | {groups} | {' | '.join(shown)} | {bits:.2f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
