"""How our engine's time grows with layers, tokens and draws, beside the growth of the necessary arithmetic.

    python -m benchmarks.trace_growth

Full grids of block outputs on SmolLM2's weights: truncated to fewer layers, or stacked twice; with context before the
subject (which nothing depends on that a patch can change) and behind it (all of which it can); with more draws. If
time grows as the arithmetic does, the fraction stays what it is.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

from benchmarks.lib.arithmetic import Clock, floor_seconds, machine, necessary_flops
from benchmarks.lib.traced_prompt import grid, setup, spread
from locus.model import Model, load_model, wrap

SIZES = (
    *(("layers", layers, 12, 5, False) for layers in (5, 10, 20, 30, 60)),
    *(("draws", 30, 12, draws, False) for draws in (1, 5, 20)),
    *(("tokens before the subject", 30, tokens, 5, False) for tokens in (12, 48, 128)),
    *(("tokens behind the subject", 30, tokens, 2, True) for tokens in (12, 24, 36)),
)
"""What grows, layers, tokens, draws, whether the context stands behind the subject."""


def with_layers(model: Model, n_layers: int) -> Model:
    """The model's first layers, or all of them over and over; the weights are copies."""
    from transformers import AutoConfig, AutoModelForCausalLM

    have = model.atlas.n_layers
    config = AutoConfig.for_model(
        **{**model.module.config.to_dict(), "num_hidden_layers": n_layers, "layer_types": None}
    )
    module = AutoModelForCausalLM.from_config(config)
    weights = model.module.state_dict()
    for name in module.state_dict():
        head, _, rest = name.partition(".layers.")
        layer, _, part = rest.partition(".")
        if part:
            weights[name] = weights[f"{head}.layers.{int(layer) % have}.{part}"]
    module.load_state_dict({name: weights[name] for name in module.state_dict()})
    return wrap(module, model.tokenizer, f"{model.name}, {n_layers} layers", bos=model.bos)


def measure(model: Model, n_tokens: int, samples: int, after: bool, rounds: int) -> dict[str, float]:
    """Seconds of our full grid and of the bare products, in turns; medians."""
    it, clock = setup(model, n_tokens, samples, after), Clock(model)
    shapes = necessary_flops(model, it)
    grid(model, it, "block", spread(it, 2))
    ours, floor = [], []
    for _ in range(rounds):
        ours.append(clock(lambda: grid(model, it, "block")))
        floor.append(floor_seconds(model, shapes, clock)[0])
    return {
        "ours": statistics.median(ours),
        "products": statistics.median(floor),
        "gflop": sum(2 * a * b * rows for (a, b), rows in shapes.items()) / 1e9,
        "fraction": statistics.median(f / o for f, o in zip(floor, ours, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = load_model("smollm2", device="cpu", dtype="float32")
    rows = []
    for grows, n_layers, n_tokens, samples, after in SIZES:
        model = whole if n_layers == whole.atlas.n_layers else with_layers(whole, n_layers)
        row = {"grows": grows, "layers": n_layers, "tokens": n_tokens, "draws": samples}
        rows.append({**row, **measure(model, n_tokens, samples, after, args.rounds)})
        if not args.json:
            print(
                " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                flush=True,
            )
    if args.json:
        print(json.dumps({**machine(), "sizes": rows}))


if __name__ == "__main__":
    main()
