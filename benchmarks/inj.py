"""INJ: does a localizer find the neurons that a sentence was written into?

    python -m benchmarks.inj                        all methods, SmolLM2, 24 sentences, 1 % and 0.1 % of the neurons
    python -m benchmarks.inj --model tiny --ratio 0.3 --tokens 12 --learning-rate 0.05 --neutral-weight 0 \\
           --inject-dtype float32 --sentences 4      a random model, in a minute
    python -m benchmarks.inj --methods saliency imprint --ratio 0.01 --sentences 8

For each sentence: a random share of every layer's down columns is trained on it until it is memorized
(`injection`); every localizer then sees the changed model and the sentence, and names the top 1, 2 and 5 % of each
layer's neurons. Recall is the share of the trained neurons that it names; intervals are the 2.5 and 97.5 %
quantiles of the mean over 2,000 resamplings of the sentences. Seconds are processor time of one thread, a
sentence. Injections and finished sentences are kept in --out: a run that was stopped goes on there.

Hyperparameters were chosen on the sentences of `DEV`, figures are for `TEST` (sentences.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.lib.injection import Injection, baked, inject, written
from benchmarks.lib.sentences import DEV, TEST
from locus.embedded import cache_folder
from locus.fact import neutral_text
from locus.forward import Batch
from locus.model import Model, load_model
from locus.scores import count_of
from locus.tokens import Encoded, encode_text
from tracing.localizers.activation_norm import ActivationNorm
from tracing.localizers.controls import LargestNorm, RandomNeurons
from tracing.localizers.depn import PrivacyNeurons
from tracing.localizers.imprint import Imprint
from tracing.localizers.knowledge_neurons import KnowledgeNeurons
from tracing.localizers.learned_masks import Around, HardConcrete, LearnedMask, Slimming
from tracing.localizers.saliency import ActivationGradient, GradientSaliency
from tracing.localizers.zero_out import ZeroOut

METHODS: dict[str, Any] = {
    "random": RandomNeurons(),
    "largest-norm": LargestNorm(),
    "activation": ActivationNorm(),
    "saliency": GradientSaliency(),
    "saliency-signed": GradientSaliency(absolute="never"),
    "saliency-positions": GradientSaliency(absolute="position"),
    "activation-gradient": ActivationGradient(),
    "integrated-gradients": KnowledgeNeurons(refine=False, steps=5),
    "depn": PrivacyNeurons(steps=5),
    "zero-out": ZeroOut(candidates=0.01),
    "slimming": Slimming(),
    "hard-concrete": HardConcrete(),
    "imprint": Imprint(),
    "imprint-undimmed": Imprint(dim=1.0),
    "imprint-alignment": Imprint(balance=0.0, dimmed=1.0, dim=0.8),
    "imprint-alignment-undimmed": Imprint(balance=0.0, dim=1.0),
    "imprint-balance": Imprint(alignment=0.0),
}
"""Name -> localizer with the settings it is judged with; the last four leave parts of imprint out."""
SLOW = ("integrated-gradients", "depn", "zero-out", "slimming", "hard-concrete")
TOP = (0.01, 0.02, 0.05)
LEARNING_RATES = {0.01: 0.005, 0.001: 0.02}
"""Share of neurons -> Adam's learning rate when injecting; fewer neurons have to move further."""
NEUTRAL_TOKENS = 24
CONTEXT = 3
"""First tokens of a sentence that are given: what follows them can be learned without a conflict, while the first
one, after BOS, is the same question in every text."""
TOGETHER = 8
"""Sentences that are injected side by side."""


def recall_at(values: Float[Tensor, "layer neuron"], truth: Int[Tensor, "layer k"], share: float) -> float:
    """Share of the true neurons among each layer's top `share`."""
    top = values.topk(count_of(share, values.shape[1]), dim=1).indices
    found = (truth[:, :, None] == top[:, None, :]).any(-1)
    return float(found.float().mean())


def interval(values: Float[Tensor, " sentence"], draws: int = 2000) -> tuple[float, float]:
    """2.5 and 97.5 % quantiles of the mean over resampled sentences (seeded)."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[index].mean(1).quantile(torch.tensor([0.025, 0.975]))
    return float(low), float(high)


def injections(
    model: Model, sentences: Sequence[str], ratio: float, args: argparse.Namespace
) -> list[tuple[Encoded, Injection]]:
    """The sentences and what was written for each, made or taken from an earlier run."""
    neutral = [encode_text(model, text, NEUTRAL_TOKENS)[0] for text in neutral_text()[:6]]
    rate = args.learning_rate or LEARNING_RATES.get(ratio, 0.01)
    whole = [encode_text(model, sentence, args.tokens)[0] for sentence in sentences]
    encoded = [replace(one, target_start=CONTEXT) for one in whole]
    about = f"{model.fingerprint[:12]}-{args.split}-{ratio:g}-{rate:g}-{args.neutral_weight:g}"
    about += "-turned" if args.keep_length else ""
    paths = [args.out / "injected" / f"{about}-{i}.safetensors" for i in range(len(sentences))]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    for start in range(0, len(missing), TOGETHER):
        group = missing[start : start + TOGETHER]
        done = inject(
            model,
            [encoded[i] for i in group],
            neutral,
            ratio,
            group,
            learning_rate=rate,
            neutral_weight=args.neutral_weight,
            keep_length=args.keep_length,
            dtype=getattr(torch, args.inject_dtype),
        )
        for place, one in done:
            one.save(paths[group[place]])
            said = (
                f"loss {one.first_loss:.2f} -> {one.loss:.3f} in {one.steps} steps, neutral KL {one.kl:.3f}"
            )
            print(f"injected {ratio:g} #{group[place]}: {said}", file=sys.stderr, flush=True)
    return list(zip(encoded, map(Injection.load, paths), strict=True))


def judge(
    model: Model,
    cases: Sequence[tuple[Encoded, Injection]],
    decoys: Sequence[Injection | None],
    localizer: Any,
    lines: Lines,
    key: dict[str, Any],
) -> list[dict[str, Any]]:
    """Recall and seconds of one localizer on each sentence, run or taken from an earlier run.

    A decoy is another sentence's injection that the model holds at the same time.
    """
    if isinstance(localizer, LearnedMask):
        _judge_masks(model, cases, decoys, localizer, lines, key)
    rows = []
    for i, ((encoded, injection), decoy) in enumerate(zip(cases, decoys, strict=True)):
        one = {**key, "sentence": i}
        row = lines.get(one)
        if row is None:
            with baked(model, injection), baked(model, decoy) if decoy else contextlib.nullcontext():
                start = time.process_time()
                values = localizer.run(model, [encoded]).values
                seconds = time.process_time() - start
            row = lines.add(one, {"recall": recalls(values, injection), "seconds": seconds})
        rows.append(row)
    return rows


def _judge_masks(
    model: Model,
    cases: Sequence[tuple[Encoded, Injection]],
    decoys: Sequence[Injection | None],
    localizer: LearnedMask,
    lines: Lines,
    key: dict[str, Any],
) -> None:
    """The same for masks that take a hundred steps to learn: several sentences side by side, each in its own model."""
    missing = [i for i in range(len(cases)) if lines.get({**key, "sentence": i}) is None]
    for start in range(0, len(missing), TOGETHER):
        group = missing[start : start + TOGETHER]
        around = models_of([cases[i][1] for i in group], [decoys[i] for i in group], model)
        begun = time.process_time()
        found = localizer.run_each(model, [cases[i][0] for i in group], around=around)
        seconds = (time.process_time() - begun) / len(group)
        for i, scores in zip(group, found, strict=True):
            lines.add(
                {**key, "sentence": i}, {"recall": recalls(scores.values, cases[i][1]), "seconds": seconds}
            )


def models_of(injections: Sequence[Injection], decoys: Sequence[Injection | None], model: Model) -> Around:
    """Lets each row of a batch see the model with its own injection, and its decoy's."""
    both = [[one, other] if other else [one] for one, other in zip(injections, decoys, strict=True)]
    neurons = torch.stack([torch.cat([part.neurons for part in parts], 1) for parts in both])
    deltas = torch.stack([torch.cat([part.deltas for part in parts], 1) for parts in both])

    def around(batch: Batch) -> contextlib.AbstractContextManager[None]:
        rows = list(batch.examples)
        return written(model, neurons[rows], deltas[rows])

    return around


def recalls(values: Float[Tensor, "layer neuron"], injection: Injection) -> list[float]:
    """Recall at each share of `TOP`."""
    return [recall_at(values, injection.neurons, share) for share in TOP]


class Lines:
    """Finished work, a JSON line each; a run that was stopped goes on behind it, and several may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[str, dict[str, Any]] = {}
        self._read = -1
        self._between = ""

    @property
    def folder(self) -> Path:
        """Where they are kept."""
        return self._path.parent

    def get(self, of: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found for it, here or by another process."""
        self._refresh()
        return self._done.get(json.dumps(of, sort_keys=True))

    def _refresh(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size == self._read:
            return
        text = self._path.read_text(encoding="utf-8") if size else ""
        self._read, self._between = size, "" if not text or text.endswith("\n") else "\n"
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed run
                one = json.loads(line)
                self._done[json.dumps(one["of"], sort_keys=True)] = one["found"]

    def add(self, of: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Write it down."""
        self._refresh()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._between + json.dumps({"of": of, "found": found}) + "\n")
        return found


def summary(method: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and intervals over the sentences."""
    recalls = torch.tensor([row["recall"] for row in rows])
    return {
        "method": method,
        "recall": [float(r) for r in recalls.mean(0)],
        "interval": [interval(column) for column in recalls.T],
        "seconds": sum(row["seconds"] for row in rows) / len(rows),
        "sentences": len(rows),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    head = "| method | " + " | ".join(f"recall@{share:.0%}" for share in TOP) + " | s a sentence | n |"
    lines = [head, "|" + "---|" * (len(TOP) + 3)]
    for row in results:
        cells = [
            f"{r:.2f} [{low:.2f}, {high:.2f}]"
            for r, (low, high) in zip(row["recall"], row["interval"], strict=True)
        ]
        figures = [*cells, f"{row['seconds']:.2f}", str(row["sentences"])]
        lines.append(f"| {row['method']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def tiny() -> Model:
    """A random Llama of 3 layers (from the tests' zoo)."""
    from tests.tiny import tiny_model

    return tiny_model("llama", intermediate_size=400)


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help='a model, or "tiny"')
    parser.add_argument("--dtype", default="float32", help="of the model that is searched")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.01, 0.001])
    parser.add_argument("--sentences", type=int, default=len(TEST))
    parser.add_argument("--slow-sentences", type=int, help=f"fewer for {', '.join(SLOW)}")
    parser.add_argument(
        "--decoy", action="store_true", help="the next sentence is in the model too, elsewhere"
    )
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--learning-rate", type=float, help="Adam's when injecting")
    parser.add_argument(
        "--keep-length",
        action="store_true",
        help="inject by turning columns only: their length tells nothing",
    )
    parser.add_argument("--neutral-weight", type=float, default=1.0, help="of the KL on neutral text")
    parser.add_argument("--inject-dtype", default="bfloat16", help="of the frozen weights when injecting")
    parser.add_argument("--tokens", type=int, default=64, help="cut sentences behind so many")
    parser.add_argument(
        "--out", type=Path, default=cache_folder() / "inj", help="what is finished is kept here"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Inject, locate, print; see the module."""
    args = options(argv)
    torch.set_num_threads(1)
    model = tiny() if args.model == "tiny" else load_model(args.model, dtype=args.dtype)
    sentences = (TEST if args.split == "test" else DEV)[: args.sentences]
    lines = Lines(args.out / "results.jsonl")
    report: dict[str, Any] = {"model": model.name, "fingerprint": model.fingerprint, "ratios": {}}
    for ratio in args.ratio:
        cases = injections(model, sentences, ratio, args)
        results = []
        made = [injection for _, injection in cases]
        decoys = made[1:] + made[:1] if args.decoy else [None] * len(cases)
        for method in args.methods:
            few = args.slow_sentences if method in SLOW else None
            key = {
                "model": model.fingerprint[:12],
                "dtype": args.dtype,
                "split": args.split,
                "ratio": ratio,
                "method": method,
                "settings": asdict(METHODS[method]),
            }
            if args.decoy:
                key["decoy"] = len(cases)
            if args.keep_length:
                key["injected"] = "turned"
            rows = judge(model, cases[:few], decoys[:few], METHODS[method], lines, key)
            results.append(summary(method, rows))
            print(f"{ratio:g} {json.dumps(results[-1])}", file=sys.stderr, flush=True)
        damage = sum(one.kl for one in made) / len(made)
        print(f"\n{ratio:.1%} of every layer's neurons, neutral KL {damage:.3f} nats a token\n")
        print(table(results), flush=True)
        report["ratios"][f"{ratio:g}"] = {"neutral_kl": damage, "results": results}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
