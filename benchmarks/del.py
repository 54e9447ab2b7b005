"""DEL: does silencing the neurons that a localizer names delete a memorized text, and only that?

    python -m benchmarks.del                        all methods, SmolLM2, what it knows by heart of `memorized`
    python -m benchmarks.del --model tiny           a random model, for a minute

After Chang et al. 2024 (arXiv:2311.09060): a text counts as memorized where the model, given its first tokens, names
at least `--known` of the following ones right, each after the true ones. A localizer sees one text (prefix as prompt,
suffix as target) and names the top share of each layer's neurons, the first layer left out; these are set to
zero. Reported is what that costs: in accuracy on that text's suffix, in accuracy on the other memorized texts' (which
ought to stay), and in perplexity of neutral text, means with 2.5 and 97.5 % quantiles over resampled texts. Prefix and
suffix are 32 and 48 tokens, or shorter where the text is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from benchmarks.inj import METHODS, SLOW, Lines, interval, tiny
from benchmarks.lib.memorized import TEXTS
from locus.embedded import cache_folder
from locus.fact import neutral_text
from locus.forward import batches, label_logits, measure
from locus.model import Model, load_model
from locus.tokens import Encoded, encode_text
from tracing.localizers.learned_masks import gated


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
    model: Model,
    known: dict[str, Encoded],
    neutral: Sequence[Encoded],
    whole: tuple[dict[str, float], float],
    name: str,
    localizer: Any,
    shares: Sequence[float],
) -> dict[str, Any]:
    """What one text, the others and neutral text lose behind the masks of that text.

    `whole` is what there was: accuracy of each text, perplexity of neutral text.
    """
    accuracies, fluency = whole
    start = time.process_time()
    scores = localizer.run(model, [known[name]])
    found: dict[str, Any] = {"seconds": time.process_time() - start}
    for share in shares:
        with silenced(model, scores.choose(share, per_layer=True)):
            lost = {key: accuracies[key] - accuracy(model, passage) for key, passage in known.items()}
            own = lost.pop(name)
            found[f"{share:g}"] = {
                "own": own,
                "others": sum(lost.values()) / max(1, len(lost)),
                "perplexity": perplexity(model, neutral) - fluency,
            }
    return found


def row_of(method: str, found: Sequence[dict[str, Any]], share: float) -> str:
    """Means and intervals over the texts, as a line of a Markdown table."""
    cells = []
    for key in ("own", "others", "perplexity"):
        column = torch.tensor([one[f"{share:g}"][key] for one in found])
        low, high = interval(column)
        digits = 1 if key == "perplexity" else 2
        cells.append(f"{float(column.mean()):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
    seconds = sum(one["seconds"] for one in found) / len(found)
    return f"| {method} | {' | '.join(cells)} | {seconds:.2f} | {len(found)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Locate, silence, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help='a model, or "tiny"')
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--share", type=float, nargs="+", default=[0.001, 0.01])
    parser.add_argument(
        "--known", type=float, default=0.7, help="accuracy from which a text counts as memorized"
    )
    parser.add_argument("--prefix", type=int, default=32)
    parser.add_argument("--suffix", type=int, default=48)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--slow-texts", type=int, help=f"fewer for {', '.join(SLOW)}")
    parser.add_argument(
        "--out", type=Path, default=cache_folder() / "del", help="what is finished is kept here"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = tiny() if args.model == "tiny" else load_model(args.model, dtype=args.dtype)
    candidates = passages(model, args.prefix, args.suffix)
    before = {name: accuracy(model, passage) for name, passage in candidates.items()}
    least = 0.0 if args.model == "tiny" else args.known
    known = {name: passage for name, passage in candidates.items() if before[name] >= least}
    if not known:
        sys.exit(f"{model.name} knows none of the {len(candidates)} texts by heart: lower --known")
    neutral = [encode_text(model, text, 48)[0] for text in neutral_text()[:4]]
    start = sum(before[name] for name in known) / len(known)
    whole = (before, perplexity(model, neutral))
    print(
        f"{len(known)} texts: {', '.join(known)}; accuracy {start:.2f}, perplexity {whole[1]:.1f}",
        flush=True,
    )
    lines = Lines(args.out / "results.jsonl")
    rows: dict[str, list[dict[str, Any]]] = {}
    for method in args.methods:
        rows[method] = []
        for name in list(known)[: args.slow_texts if method in SLOW else None]:
            settings = asdict(METHODS[method])
            key = {"model": model.fingerprint[:12], "dtype": args.dtype, "text": name, "known": sorted(known)}
            key |= {"shares": args.share, "method": method, "settings": settings, "lost": True}
            found = lines.get(key)
            if found is None:
                found = lines.add(key, judge(model, known, neutral, whole, name, METHODS[method], args.share))
            rows[method].append(found)
    for share in args.share:
        print(f"\n{share:.1%} of each layer's neurons silenced\n")
        print(
            "| method | own accuracy lost | others' | perplexity gained | s a text | n |\n|---|---|---|---|---|---|"
        )
        for method, of_method in rows.items():
            print(row_of(method, of_method, share))


if __name__ == "__main__":
    main()
