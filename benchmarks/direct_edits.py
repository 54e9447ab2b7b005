"""What direct edits of weights forget, what they cost elsewhere, and how long they take.

    python -m benchmarks.direct_edits -o FOLDER [--parts removal sequence neurons cost]
    python -m benchmarks.direct_edits --quick        a tiny random model, in seconds

removal: ROME, MEMIT, AlphaEdit, LaW and projection with their defaults, each from the base. sequence: each fact's
probability just after its own edit and after all of them, ROME fact by fact and MEMIT in batches of four. neurons:
dose curves of neuron edits, with the smallest dose that brings the facts' mean probability to 0.05. cost: an edit of
100 neurons, and second moments over `--tokens` tokens of Python's own documentation (`pydoc_data.topics`).

Judged by probability and accuracy of the 16 facts of `demo-forget` and of three paraphrases each, the share that
stays right of their neighbours and of the held-out facts of `demo-retain`, and KL(base || edited) on neutral text
that no edit has read. Before a row is kept: no weight outside the mask differs, and the model in memory is bit for
bit the base again. Finished rows stay in FOLDER, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.yardstick import Yardstick, kept_row
from editors import EDITORS, MEMIT, ROME
from editors.dose import Dose
from editors.neuron_descent import NeuronDescent
from editors.neuron_edits import NeuronMean, NeuronZero
from editors.neuron_selective import NeuronSelective
from editors.projection import EraseSubspace
from editors.statistics import second_moments
from locus.fact import Fact, neutral_text, read_facts, split_text
from locus.forward import measure
from locus.mask import WeightMask
from locus.model import Model, load_model
from locus.scores import NeuronScores
from locus.tokens import encode
from tracing import GradientSaliency, RandomNeurons

GOAL = 0.05
N_TEXT = 6
"""Unseen paragraphs that the KL is taken over."""
LEAST_SQUARES = ("alphaedit", "memit", "rome", "law")
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, the facts, and where rows go."""

    model: Model
    forget: Sequence[Fact]
    retain: Sequence[Fact]
    text: Sequence[str]
    """Neutral paragraphs that an edit may read."""
    yardstick: Yardstick
    folder: Path
    moment_tokens: int = 100_000
    """Tokens that second moments are timed over."""

    @classmethod
    def of(
        cls, model: Model, forget: Sequence[Fact], retain: Sequence[Fact], text: Sequence[str], folder: Path
    ) -> Bench:
        """Ask the base what it knows."""
        seen, unseen = split_text(text)
        held_out = [fact for fact in retain if fact.held_out]
        return cls(
            model, forget, retain, seen, Yardstick.of(model, forget, held_out, unseen[:N_TEXT]), folder
        )

    def edit(self, name: str, editor: Any, mask: WeightMask) -> Row:
        """One row: an editor with a mask."""

        def make() -> Row:
            return self.yardstick.row(
                mask, lambda: editor.run(self.model, self.forget, self.retain, mask, text=self.text)
            )

        return kept_row(self.folder / f"{name}.json", make)


def removal(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Every least-squares editor and the projection with their defaults."""
    yield "base", kept_row(bench.folder / "base.json", bench.yardstick.read)
    for name in LEAST_SQUARES:
        editor = EDITORS[name]()
        yield name, bench.edit(name, editor, editor.own_mask(bench.model))
    yield "projection", bench.edit("projection", EraseSubspace(), located(bench, "1%"))


def sequence(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Probabilities just after each fact's own edit, and at the end."""
    for name, editor in (("rome", ROME()), ("memit in fours", MEMIT(batch=4))):
        yield (
            name,
            kept_row(
                bench.folder / f"sequence-{name.replace(' ', '-')}.json",
                lambda editor=editor: _followed(bench, editor),
            ),
        )


def _followed(bench: Bench, editor: Any) -> Row:
    done: list[str] = []
    own: dict[str, float] = {}
    by_id = {fact.id: fact for fact in bench.forget}

    def look(record: Mapping[str, Any]) -> None:
        done.append(record["fact"])  # the model in memory is edited so far
        own[record["fact"]] = float(measure(bench.model, [by_id[record["fact"]]]).prob[0])

    mask = editor.own_mask(bench.model)
    delta = editor.run(bench.model, bench.forget, bench.retain, mask, text=bench.text, log=look)
    with delta.applied(bench.model):
        end = dict(zip(done, measure(bench.model, [by_id[i] for i in done]).prob.tolist(), strict=True))
    rises = [end[i] - own[i] for i in done]
    return {"own": own, "end": end, "p": sum(end.values()) / len(end), "largest_rise": max(rises)}


def neurons(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Dose curves of neuron edits, on located neurons and on as many random ones."""
    for name, editor, mask in neuron_edits(bench):
        yield name, bench.edit(f"neurons-{name.replace(' ', '-').replace('%', '')}", editor, mask)


def neuron_edits(bench: Bench) -> Iterator[tuple[str, Any, WeightMask]]:
    """Name, editor and mask of every dose curve."""
    dose = Dose(goal=GOAL)
    few, some, many = (located(bench, budget) for budget in ("0.1%", "1%", "10%"))
    yield "zero 0.1%", NeuronZero(strength=1.0, dose=dose), few
    yield "zero 1%", NeuronZero(strength=1.0, dose=dose), some
    yield "mean 1%", NeuronMean(dose=dose), some
    yield "selective 1%", NeuronSelective(strength=4.0, dose=dose), some
    yield "selective 10%", NeuronSelective(strength=4.0, dose=dose), many
    yield "descent 1%", NeuronDescent(strength=40.0, dose=dose), some
    yield "descent 10%", NeuronDescent(strength=40.0, dose=dose), many
    control = RandomNeurons(seed=0).run(bench.model)
    yield "zero random 1%", NeuronZero(strength=1.0, dose=dose), control.top("1%", parts=("down",))
    yield "descent random 10%", NeuronDescent(strength=40.0, dose=dose), control.top("10%", parts=("down",))


def located(bench: Bench, budget: str) -> WeightMask:
    """The values of the neurons that saliency finds."""
    path = bench.folder / "saliency.safetensors"
    if not path.exists():
        bench.folder.mkdir(parents=True, exist_ok=True)
        GradientSaliency().run(bench.model, bench.forget).save(path)
    return NeuronScores.load(path).top(budget, parts=("down",))


def cost(bench: Bench) -> Iterator[tuple[str, Row]]:
    """Seconds of a neuron edit, of second moments, and of finding them again."""
    model, n = bench.model, min(100, bench.model.atlas.d_mlp)

    def hundred() -> Row:
        assert model.fingerprint  # hashing the checkpoint is part of loading it
        start, worked = time.monotonic(), time.process_time()
        editor = NeuronZero(neurons=tuple(f"{i % model.atlas.n_layers}:{i}" for i in range(n)))
        delta = editor.run(model, [], [], editor.own_mask(model))
        assert 0.99 < delta.n_changed / (n * model.atlas.d_model) <= 1  # a weight that is 0 stays 0
        return {
            "neurons": n,
            "seconds": time.monotonic() - start,
            "cpu_seconds": time.process_time() - worked,
        }

    yield "neurons", kept_row(bench.folder / "cost-neurons.json", hundred)
    yield (
        "moments",
        kept_row(bench.folder / "cost-moments.json", lambda: _moments(model, bench.moment_tokens)),
    )


def _moments(model: Model, n_tokens: int) -> Row:
    from pydoc_data.topics import topics

    text = [topics[name] for name in sorted(topics)]
    layers = [one % model.atlas.n_layers for one in (4, 5, 6, 7, 8)]
    found: Row = {"threads": torch.get_num_threads(), "layers": layers}
    with tempfile.TemporaryDirectory() as place:
        for what in ("first", "again"):
            start, worked = time.monotonic(), time.process_time()
            moments = second_moments(model, sorted(set(layers)), text, n_tokens=n_tokens, folder=Path(place))
            found |= {f"{what}_s": time.monotonic() - start, f"{what}_cpu_s": time.process_time() - worked}
    found["tokens"] = moments[layers[0]].n_tokens
    return found


PARTS: Mapping[str, Callable[[Bench], Iterator[tuple[str, Row]]]] = {
    "removal": removal,
    "sequence": sequence,
    "neurons": neurons,
    "cost": cost,
}


def main() -> None:
    """Run the parts asked for and print their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("-o", "--out", type=Path, help="folder that keeps finished rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=100_000, help="that second moments are timed over")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny random model: does everything still run?"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        with tempfile.TemporaryDirectory() as place:
            os.environ["LOCUS_CACHE"] = place
            bench = tiny(Path(place))
            report(bench, PARTS)
        return
    if args.out is None:
        sys.exit("direct_edits: give -o FOLDER, which keeps the rows")
    bench = Bench.of(
        load_model("smollm2"), read_facts("demo-forget"), read_facts("demo-retain"), neutral_text(), args.out
    )
    report(replace(bench, moment_tokens=args.tokens), args.parts)


def report(bench: Bench, parts: Sequence[str] | Mapping[str, Any]) -> None:
    """Print every row of some parts as soon as it is there."""
    for part in parts:
        print(f"# {part}")
        for name, row in PARTS[part](bench):
            shown = {key: value for key, value in row.items() if isinstance(value, int | float)}
            print(f"{name:<20}" + "  ".join(f"{key} {value:.4g}" for key, value in shown.items()), flush=True)


def tiny(folder: Path) -> Bench:
    """The same walk on a random model of three layers and facts of its own."""
    from tests.tiny import tiny_facts, tiny_model

    model = tiny_model("llama")
    facts = [_answered(model, fact) for fact in tiny_facts()]
    text = [
        "The city of Rome is in Italy. Berlin is the capital of Germany.",
        "What language does François Truffaut speak? The Colosseum is in the city of Rome.",
        "The capital of Italy is Rome. Paris is not far.",
    ]
    kept = replace(facts[2], id="kept", held_out=False)
    bench = Bench.of(model, facts[:2], [facts[2], kept], text * 2, folder)
    return replace(bench, moment_tokens=5_000)


def _answered(model: Model, fact: Fact) -> Fact:
    """The fact with the likeliest token for its target that text can give."""
    encoded = encode(model, fact)
    with torch.no_grad():
        logits = model.module(torch.tensor([encoded.prompt_ids])).logits[0, -1]
    for token in logits.argsort(descending=True).tolist():
        word = model.tokenizer.decode([token])
        if model.tokenizer(fact.prompt + word).input_ids == [*encoded.prompt_ids, token]:
            return replace(fact, target=word, neighbours=())
    raise AssertionError("no token follows this prompt")


if __name__ == "__main__":
    main()
