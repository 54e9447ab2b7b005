"""Knowledge neurons' integrated gradients: one token at a time behind recorded keys and values, or whole forwards.

    python -m benchmarks.knowledge_neurons                     SmolLM2, a prompt of 48 tokens, 20 points, all layers
    python -m benchmarks.knowledge_neurons --every 5           the plain way for every fifth layer only, times 5 (~)
    python -m benchmarks.knowledge_neurons --model tiny        a random model, in seconds

Both ways answer the same question, asserted to 1e-5 of the largest attribution before anything is printed. The plain
way runs the 20 points of a layer as one batch, which is its best case. Seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locus.fact import neutral_text
from locus.model import Model, load_model
from locus.tokens import encode_text
from tracing.gradients.integrated_gradients import attribute_one_token, attribute_plainly

Attribute = Callable[..., Float[Tensor, "layer neuron"]]


def timed(
    attribute: Attribute, model: Model, ids: tuple[int, ...], steps: int, **more: Any
) -> tuple[Tensor, float]:
    """Attributions of the last token after the others, and the seconds they took."""
    start = time.process_time()
    found = attribute(model, ids[:-1], ids[-1], steps, **more)
    return found, time.process_time() - start


def main() -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2", help='a model, or "tiny"')
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="the plain way for one layer in so many")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model == "tiny":
        from tests.tiny import tiny_model

        model = tiny_model("llama")
    else:
        model = load_model(args.model)
    text = " ".join(neutral_text())
    ids = encode_text(model, text, args.tokens + 1)[0].ids
    timed(attribute_one_token, model, ids, 1)  # the first call of anything is slower
    quick, quick_seconds = timed(attribute_one_token, model, ids, args.steps)
    layers = range(args.every // 2, model.atlas.n_layers, args.every)
    plain, plain_seconds = timed(attribute_plainly, model, ids, args.steps, layers=layers)
    plain_seconds *= model.atlas.n_layers / len(layers)
    which = list(layers)
    apart = float((quick - plain)[which].abs().max() / plain[which].abs().max())
    if apart > 1e-5:
        raise SystemExit(f"the two ways differ by {apart:.1e} of the largest attribution")
    result = {
        "tokens": len(ids) - 1,
        "steps": args.steps,
        "one_token_seconds": quick_seconds,
        "plain_seconds": plain_seconds,
        "times_faster": plain_seconds / quick_seconds,
        "apart": apart,
        "plain_layers": len(layers),
    }
    if args.json:
        print(json.dumps(result))
        return
    about = "~" if args.every > 1 else ""
    print(
        f"{model.name}, {len(ids) - 1} tokens, {args.steps} points: one token {quick_seconds:.2f} s, whole forwards "
        f"{about}{plain_seconds:.1f} s, {about}{plain_seconds / quick_seconds:.0f} times; "
        f"apart by {apart:.1e} of the largest"
    )


if __name__ == "__main__":
    main()
