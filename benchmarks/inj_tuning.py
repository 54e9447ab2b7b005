"""Settings of the learned masks (Slimming, Hard Concrete), tried on the dev sentences of the INJ benchmark.

    python -m benchmarks.inj_tuning --method slimming --sentences 2 --ratio 0.01
    python -m benchmarks.inj_tuning --method hard-concrete --settings penalty=1000,learning_rate=0.1 initial=0

Recall is counted along the way, so that one run says how many steps are enough. What is finished is kept beside the
benchmark's own results and not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks import inj
from benchmarks.lib.sentences import DEV
from locus.embedded import cache_folder
from locus.model import Model, load_model
from tracing.localizers.learned_masks import HardConcrete, LearnedMask, Slimming

METHODS: dict[str, LearnedMask] = {"slimming": Slimming(), "hard-concrete": HardConcrete()}


def along(model: Model, cases: Sequence[Any], localizer: LearnedMask, every: int) -> list[dict[str, Any]]:
    """Mean recall after every `every` steps and after the last, all sentences side by side."""
    sentences, injections = zip(*cases, strict=True)
    around = inj.models_of(injections, [None] * len(cases), model)
    start = time.process_time()
    points: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    for step, values in enumerate(localizer.path(model, sentences, apart=True, around=around), 1):
        seconds = (time.process_time() - start) / len(cases)
        last = {"step": step, "seconds": seconds, "mean": float(values.mean()), "values": values}
        if step % every == 0:
            points.append(last)
    points += [] if points[-1:] == [last] else [last]
    for point in points:
        found = [inj.recalls(v, one) for v, one in zip(point.pop("values"), injections, strict=True)]
        point["recall"] = torch.tensor(found).mean(0).tolist()
    return points


def settings_of(text: str) -> dict[str, float | int]:
    """ "penalty=100,steps=50" as numbers."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return {name: int(value) if name in ("steps", "seed") else float(value) for name, value in pairs}


def main(argv: Sequence[str] | None = None) -> None:
    """Learn masks under each setting, print recall along the way; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", choices=tuple(METHODS), required=True)
    parser.add_argument("--settings", nargs="+", default=[""], help="penalty=100,steps=50 …: one run each")
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--sentences", type=int, default=2)
    parser.add_argument("--every", type=int, default=20)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = inj.tiny() if args.model == "tiny" else load_model(args.model)
    how = inj.options(["--split", "dev"])
    cases = inj.injections(model, DEV[: args.sentences], args.ratio, how)
    lines = inj.Lines(cache_folder() / "inj" / "tuning.jsonl")
    for text in args.settings:
        chosen: Any = METHODS[args.method]
        localizer = replace(chosen, **settings_of(text))
        of = {"model": model.fingerprint[:12], "method": args.method, "settings": asdict(localizer)}
        of |= {"ratio": args.ratio, "sentences": len(cases), "every": args.every}
        found = lines.get(of) or lines.add(of, {"points": along(model, cases, localizer, args.every)})
        print(f"\n{args.method} {text or '(defaults)'}, {len(cases)} sentences")
        for point in found["points"]:
            shown = "/".join(f"{r:.2f}" for r in point["recall"])
            print(
                f"  step {point['step']:4}: recall {shown}, mean score {point['mean']:.3f}, "
                f"{point['seconds']:.1f} s a sentence",
                flush=True,
            )


if __name__ == "__main__":
    main()
