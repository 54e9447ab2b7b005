"""DEL: does silencing the neurons that a localizer names delete a memorized text, and only that?

    python -m benchmarks.del                        all methods, SmolLM2, what it knows by heart of `memorized`
    python -m benchmarks.del --model tiny           a random model, for a minute

After Chang et al. 2024 (arXiv:2311.09060): a text counts as memorized where the model, given its first tokens, names
at least `--known` of the following ones right, each after the true ones. A localizer sees one text (prefix as prompt,
suffix as target) and names the top share of each layer's neurons, the first layer left out; these are set to
zero. Reported are the accuracy on that text's suffix, on the other memorized texts' (which ought to stay), and the
perplexity of neutral text, with 2.5 and 97.5 % quantiles over resampled texts. Prefix and suffix are 32 and 48
tokens, or shorter where the text is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from benchmarks.inj import METHODS, interval, tiny
from benchmarks.memorized import TEXTS
from locus.fact import neutral_text
from locus.forward import batches, label_logits, measure
from locus.model import Model, load_model
from locus.tokens import Encoded, encode_text
from tracing.neuron_masks import gated


def passages(model: Model, prefix: int, suffix: int) -> dict[str, Encoded]:
    """Each text cut to prefix and suffix; the suffix is the target."""
    found = {}
    for name, text in TEXTS.items():
        whole = encode_text(model, text, prefix + suffix + 1)[0]
        start = min(prefix + 1, len(whole.ids) // 2)
        found[name] = Encoded(whole.ids, start, None, whole.tokens)
    return found


@torch.no_grad()
def accuracy(model: Model, passage: Encoded) -> float:
    """Share of the suffix's tokens that are the first choice after the true ones."""
    (batch,) = batches([passage])
    return float((label_logits(model, batch).argmax(-1).cpu() == batch.labels).float().mean())


def perplexity(model: Model, texts: Sequence[Encoded]) -> float:
    """Of neutral text."""
    scores = measure(model, texts)
    return float((scores.nll.sum() / scores.n_tokens.sum()).exp())


def silenced(model: Model, chosen: Bool[Tensor, "layer neuron"]) -> Any:
    """Forwards with these neurons at zero, the first layer's left alone."""
    gates = (~chosen).float()
    gates[0] = 1
    return gated(model, gates)


def judge(
    model: Model, known: dict[str, Encoded], neutral: Sequence[Encoded], localizer: Any, share: float
) -> Any:
    """One row: accuracies and perplexity behind the masks of each text in turn."""
    own, others, damage, seconds = [], [], [], 0.0
    for name, passage in known.items():
        start = time.process_time()
        chosen = localizer.run(model, [passage]).choose(share, per_layer=True)
        seconds += time.process_time() - start
        with silenced(model, chosen):
            own.append(accuracy(model, passage))
            rest = [accuracy(model, other) for key, other in known.items() if key != name]
            others.append(sum(rest) / max(1, len(rest)))
            damage.append(perplexity(model, neutral))
    columns = [torch.tensor(column) for column in (own, others, damage)]
    return {
        "own": (float(columns[0].mean()), *interval(columns[0])),
        "others": (float(columns[1].mean()), *interval(columns[1])),
        "perplexity": (float(columns[2].mean()), *interval(columns[2])),
        "seconds": seconds / len(known),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Locate, silence, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help='a model, or "tiny"')
    parser.add_argument("--share", type=float, nargs="+", default=[0.001, 0.005, 0.01])
    parser.add_argument(
        "--known", type=float, default=0.8, help="accuracy from which a text counts as memorized"
    )
    parser.add_argument("--prefix", type=int, default=32)
    parser.add_argument("--suffix", type=int, default=48)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = tiny() if args.model == "tiny" else load_model(args.model)
    candidates = passages(model, args.prefix, args.suffix)
    before = {name: accuracy(model, passage) for name, passage in candidates.items()}
    least = 0.0 if args.model == "tiny" else args.known
    known = {name: passage for name, passage in candidates.items() if before[name] >= least}
    if not known:
        sys.exit(f"{model.name} knows none of the {len(candidates)} texts by heart: lower --known")
    neutral = [one for text in neutral_text()[:6] for one in encode_text(model, text, 64)[:1]]
    start = sum(before[name] for name in known) / len(known)
    print(
        f"{len(known)} texts: {', '.join(known)}; accuracy {start:.2f}, perplexity {perplexity(model, neutral):.1f}"
    )
    report: dict[str, Any] = {"model": model.name, "accuracy": before, "shares": {}}
    for share in args.share:
        print(f"\n{share:.1%} of each layer's neurons silenced\n")
        print("| method | own accuracy | others' accuracy | perplexity | s a text |\n|---|---|---|---|---|")
        rows = {}
        for method in args.methods:
            rows[method] = row = judge(model, known, neutral, METHODS[method], share)
            own, others, damage = (row[key] for key in ("own", "others", "perplexity"))
            print(
                f"| {method} | {own[0]:.2f} [{own[1]:.2f}, {own[2]:.2f}] | {others[0]:.2f} [{others[1]:.2f}, "
                f"{others[2]:.2f}] | {damage[0]:.1f} | {row['seconds']:.2f} |",
                flush=True,
            )
        report["shares"][f"{share:g}"] = rows
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
