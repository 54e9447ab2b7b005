"""Where a real model looks up a country's continent: the curve of `lookup-probe`, and the same with answers shuffled.

    python -m benchmarks.continents

48 countries of three continents; the shuffled answers keep the subjects and the answers' frequencies, so what is
decodable there is what the probe reads into noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from locus.fact import Fact
from locus.forward import measure
from locus.model import load_model
from tracing.localizers.lookup_probe import AccuracyCurve, LookupProbe

COUNTRIES = {
    " Europe": "Germany France Spain Italy Poland Sweden Norway Portugal Greece Austria Hungary Romania Finland "
    "Denmark Belgium Ireland",
    " Africa": "Kenya Nigeria Ghana Egypt Morocco Ethiopia Uganda Tanzania Senegal Zambia Angola Algeria Tunisia "
    "Somalia Sudan Mali",
    " Asia": "Japan China India Thailand Vietnam Nepal Iran Iraq Pakistan Mongolia Malaysia Indonesia Bangladesh "
    "Cambodia Laos Myanmar",
}


def facts(each: int = 16) -> list[Fact]:
    """One for each country, the first so many of each continent."""
    return [
        Fact(
            id=country,
            prompt=f"{country} is a country on the continent of",
            target=continent,
            subject=country,
            relation="continent",
        )
        for continent, countries in COUNTRIES.items()
        for country in countries.split()[:each]
    ]


def row(name: str, curve: AccuracyCurve) -> str:
    """Decodability in the stream before the first MLP, and behind each."""
    values = [float(curve.before[0]), *curve.behind.tolist()]
    return f"{name:9} " + " ".join(f"{value:5.2f}" for value in values)


def main(argv: Sequence[str] | None = None) -> None:
    """Probe twice, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ridge", type=float, default=LookupProbe.ridge)
    parser.add_argument("--each", type=int, default=16, help="countries a continent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, told = load_model(args.model), facts(args.each)
    right = float(measure(model, told).correct.float().mean())
    print(f"{len(told)} facts, {right:.2f} of them answered right")
    order = torch.randperm(len(told), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [replace(fact, target=told[i].target) for fact, i in zip(told, order, strict=True)]
    for name, given in (("answers", told), ("shuffled", shuffled)):
        start = time.process_time()
        curve = LookupProbe(ridge=args.ridge).curve(model, given)
        print(f"{row(name, curve)}   {time.process_time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
