"""Error of the memory estimate of an edit where the truth can be measured, and estimates for 7B shapes.

    python -m benchmarks.memory_estimate            SmolLM2 in float32 and bfloat16, a wide random model, all on the CPU
    python -m benchmarks.memory_estimate --shapes   Llama-2-7B and Llama-3.1-8B in bfloat16, from their configurations

Each measured row is two steps of NPO with 1 % of the neurons in a process of its own, on the longest examples that a
step could draw, which the estimate assumes. The truth is the allocator's: torch's profiler reports every allocation and
release of the process, those inside kernels too, and their running sum is followed from before the deltas exist; the
weights, which were there before, are added by their size. Beside it stands the growth of the resident set, which also
sees what the C library keeps back. Nothing of this needs a GPU, and nothing of it has been checked on one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.edit_cost import forget_the_peak, neuron_mask, resident_mb
from editors.editor import EditData
from editors.memory_estimate import LargestForwards, MemoryEstimate
from editors.objectives.npo import NPO
from editors.training.activation_checkpointing import activation_checkpointing
from editors.training.data import Data
from editors.training.finetune import Run
from editors.training.parametrize import Deltas
from editors.training.reference import References
from editors.training.run_state import RunState
from editors.training.settings import Training, make_optimizer
from locus.fact import Fact, neutral_text, read_facts, trainable_facts
from locus.model import Model, load_model, load_shape, wrap
from locus.tokens import encode

ROWS = (
    ("smollm2", "float32", False),
    ("smollm2", "float32", True),
    ("smollm2", "bfloat16", False),
    ("smollm2", "bfloat16", True),
    ("wide", "float32", False),
    ("wide", "float32", True),
)
"""Model, dtype, activation checkpointing."""
WIDE = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
"""Six layers, as wide as a model of a billion and a half."""
SHAPES = {
    "Llama-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def llama(name: str, settings: dict[str, int], device: str, dtype: str) -> Model:
    """A random (or, on the meta device, empty) Llama of this shape, with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_shape("smollm2").tokenizer
    config = LlamaConfig.from_dict({"vocab_size": len(tokenizer), **settings})
    with torch.device(device):
        torch.manual_seed(0)
        module = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return wrap(module, tokenizer, name=name)


def edit_of(checkpointing: bool, steps: int = 2) -> NPO:
    """The default edit; no rule may stop it."""
    settings = Training(
        steps=steps, checkpointing=checkpointing, floor=0.0, goal=0.0, utility=0.0, max_kl=0.0
    )
    return NPO(training=settings)


def longest_draw(model: Model, editor: NPO) -> tuple[list[Fact], list[Fact], list[str]]:
    """The facts to forget, and the longest retain facts and paragraph that a step could draw."""
    kept = trainable_facts(read_facts("demo-retain"))
    kept.sort(key=lambda fact: len(encode(model, fact).ids), reverse=True)
    return read_facts("demo-forget"), kept[: editor.retain.facts], [max(neutral_text(), key=len)]


def measure_row(name: str, dtype: str, checkpointing: bool) -> dict[str, Any]:
    """Estimate and truth of one row, in MB."""
    model = load_model("smollm2", dtype=dtype) if name == "smollm2" else llama("wide", WIDE, "cpu", dtype)
    editor, mask = edit_of(checkpointing), neuron_mask(model, 0.01)
    facts, kept, text = longest_draw(model, editor)
    given = EditData(facts, kept, text)
    estimate = MemoryEstimate.of(model, mask, editor, LargestForwards.of(model, editor, given))
    data = Data.read(model, given, editor.retain, editor.training)
    forget_the_peak()
    resident = resident_mb()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        deltas = Deltas(model.module, mask)
        references = References(model, deltas)
        optimizer = make_optimizer(editor.training, deltas.parameters)
        run = Run(editor, model, deltas, data, optimizer, references)
        state = RunState.fresh(len(data.forget), deltas.values)
        with deltas.attached(), activation_checkpointing(model, checkpointing):
            for _ in range(editor.training.steps):
                run.take_step(state)
    grown = resident_mb("VmHWM") - resident
    kept_mb = sum(logits.nbytes for logits in references.known.values()) / 1e6
    alive = peak = 0
    assert seen.profiler is not None and seen.profiler.kineto_results is not None, "the profiler has run"
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert peak > 0, "the profiler saw no allocation"
    said = (estimate.peak - estimate.weights) / 1e6
    return {
        "weights": estimate.weights / 1e6,
        "estimate": said,
        "allocator": peak / 1e6 - kept_mb,
        "resident": grown - kept_mb,
        "of_allocator": said / (peak / 1e6 - kept_mb),
        "total_of_truth": estimate.peak / 1e6 / (estimate.weights / 1e6 + peak / 1e6 - kept_mb),
    }


def shapes() -> None:
    """Accounts of shapes that are too large to measure here."""
    for name, settings in SHAPES.items():
        model = llama(name, settings, "meta", "bfloat16")
        mask = neuron_mask(model, 0.01)
        for checkpointing in (False, True):
            estimate = MemoryEstimate.of(
                model, mask, edit_of(checkpointing), LargestForwards(kept_labels=30 * 16 * 3)
            )
            print(
                f"\n{name}, bfloat16, {mask.n_weights:,} weights, checkpointing {checkpointing}\n{estimate}"
            )
            assert estimate.peak < 24e9, "does not fit a card of 24 GB"


def main() -> None:
    """Measure, or print estimates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--row", type=int)
    args = parser.parse_args()
    if args.shapes:
        shapes()
        return
    if args.row is not None:
        print(json.dumps(measure_row(*ROWS[args.row])))
        return
    titles = ("weights", "estimate", "allocator", "resident", "of_allocator", "total_of_truth")
    print(f"{'':32}" + "".join(f"{title:>15}" for title in titles))
    for number, (name, dtype, checkpointing) in enumerate(ROWS):
        command = [sys.executable, "-m", "benchmarks.memory_estimate", "--row", str(number)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        row = json.loads(done.stdout)
        title = f"{name} {dtype}" + (" checkpointing" if checkpointing else "")
        print(f"{title:32}" + "".join(f"{row[key]:15.3f}" for key in titles), flush=True)


if __name__ == "__main__":
    main()
