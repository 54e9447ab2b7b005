"""What direct edits of weights forget, what they cost elsewhere, and how long they take.

    python -m benchmarks.direct_edits -o FOLDER [--parts removal neurons cost]
    python -m benchmarks.direct_edits --quick        a tiny random model, in seconds

removal: ROME, MEMIT, AlphaEdit, LaW and projection with their defaults, each from the base; largest_rise is how
much a fact's probability rose at most between its own edit and the end, for ROME fact by fact, for MEMIT also in
batches of four. neurons: strength curves of neuron edits, with the smallest strength that brings the facts' mean
probability to 0.05. cost: an edit of 100 neurons, and second moments over `--tokens` tokens of Python's own
documentation (`pydoc_data.topics`).

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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.yardstick import Yardstick, kept_row
from editors import EDITORS, MEMIT
from editors.closed_form.subspace_projection import EraseSubspace
from editors.key_value.second_moments import second_moments
from editors.neurons.neuron_descent import NeuronDescent
from editors.neurons.neuron_edits import NeuronMean, NeuronZero
from editors.neurons.neuron_selective import NeuronSelective
from locus.delta import WeightDelta
from locus.fact import Fact, held_out_facts, neutral_text, read_facts, split_text
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
Rows = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, the facts, and where rows go."""

    model: Model
    forget: Sequence[Fact]
    retain: Sequence[Fact]
    neutral: Sequence[str]
    """Paragraphs; every third is left for judging."""
    folder: Path
    moment_tokens: int = 100_000
    """Tokens that second moments are timed over."""

    @property
    def text(self) -> list[str]:
        """Paragraphs that an edit may read."""
        return split_text(self.neutral)[0]

    @cached_property
    def yardstick(self) -> Yardstick:
        """Asks the base what it knows, when it is first needed."""
        held_out = held_out_facts(self.retain)
        return Yardstick.of(self.model, self.forget, held_out, split_text(self.neutral)[1][:N_TEXT])

    def edit(self, name: str, editor: Any, mask: WeightMask) -> Row:
        """One row: an editor with a mask; and each fact's probability just after its own edit, and at the end."""
        by_id = {fact.id: fact for fact in self.forget}
        own: dict[str, float] = {}
        end: dict[str, float] = {}

        def look(record: Mapping[str, Any]) -> None:
            if "fact" in record:  # the model in memory is edited so far
                own[record["fact"]] = float(measure(self.model, [by_id[record["fact"]]]).prob[0])

        def make() -> WeightDelta:
            delta: WeightDelta = editor.run(
                self.model, self.forget, self.retain, mask, text=self.text, log=look
            )
            with delta.applied(self.model):
                prob = measure(self.model, [by_id[i] for i in own]).prob.tolist() if own else []
            end.update(zip(own, prob, strict=True))
            return delta

        def row() -> Row:
            found = self.yardstick.row(mask, make)
            rise = {"largest_rise": max(end[i] - own[i] for i in own)} if own else {}
            return {**found, **rise, "own": own, "end": end}

        return kept_row(self.folder / f"{name.replace(' ', '-').replace('%', '')}.json", row)


def removal(bench: Bench) -> Rows:
    """Every least-squares editor, with a refusal for the target, and the projection; else with their defaults.

    Their default target is judged in `fresh_facts` and `frontier`.
    """
    yield "base", lambda: kept_row(bench.folder / "base.json", lambda: bench.yardstick.read())
    for name in LEAST_SQUARES:
        editor: Any = EDITORS[name]()
        editor = replace(editor, target=replace(editor.target, to="refusal"))
        yield name, partial(bench.edit, name, editor, editor.own_mask(bench.model))
    fours = MEMIT(batch=4, target=replace(MEMIT().target, to="refusal"))
    yield "memit in fours", partial(bench.edit, "memit in fours", fours, fours.own_mask(bench.model))
    yield "projection", lambda: bench.edit("projection", EraseSubspace(), located(bench, "1%"))


def _at(bench: Bench, name: str, editor: Any, budget: str) -> Row:
    """The row of an edit of located neurons."""
    return bench.edit(name, editor, located(bench, budget))


def neurons(bench: Bench) -> Rows:
    """Strength curves of neuron edits, on located neurons and on as many random ones."""
    n_layers = bench.model.atlas.n_layers
    descent = NeuronDescent(layers=tuple(range(0, n_layers, 3)), strength_goal=GOAL)
    yield "descent layers", lambda: bench.edit("descent layers", descent, descent.own_mask(bench.model))
    for name, editor, budget in (
        ("zero 0.1%", NeuronZero(strength_goal=GOAL), "0.1%"),
        ("mean 0.1%", NeuronMean(strength_goal=GOAL), "0.1%"),
        ("selective 10%", NeuronSelective(strength=4.0, strength_goal=GOAL), "10%"),
        ("descent 0.1%", NeuronDescent(strength_goal=GOAL), "0.1%"),
        ("descent 10%", NeuronDescent(strength_goal=GOAL), "10%"),
    ):
        yield name, partial(_at, bench, name, editor, budget)
    for name, editor, budget in (
        ("zero random 1%", NeuronZero(strength_goal=GOAL), "1%"),
        ("descent random 10%", NeuronDescent(strength_goal=GOAL), "10%"),
    ):
        mask = RandomNeurons(seed=0).run(bench.model).top(budget, parts=("down",))
        yield name, partial(bench.edit, name, editor, mask)


def located(bench: Bench, budget: str) -> WeightMask:
    """The values of the neurons that saliency finds."""
    path = bench.folder / "saliency.safetensors"
    if not path.exists():
        bench.folder.mkdir(parents=True, exist_ok=True)
        GradientSaliency().run(bench.model, bench.forget).save(path)
    return NeuronScores.load(path).top(budget, parts=("down",))


def cost(bench: Bench) -> Rows:
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

    yield "neurons", lambda: kept_row(bench.folder / "cost-neurons.json", hundred)
    yield (
        "moments",
        lambda: kept_row(bench.folder / "cost-moments.json", lambda: _moments(model, bench.moment_tokens)),
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


PARTS: Mapping[str, Callable[[Bench], Rows]] = {
    "removal": removal,
    "neurons": neurons,
    "cost": cost,
}


def main() -> None:
    """Run the parts asked for and print their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--rows", nargs="+", help="only these rows")
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
    facts = read_facts("demo-forget"), read_facts("demo-retain")
    report(Bench(load_model("smollm2"), *facts, neutral_text(), args.out, args.tokens), args.parts, args.rows)


def report(bench: Bench, parts: Sequence[str] | Mapping[str, Any], rows: Sequence[str] | None = None) -> None:
    """Print the rows of some parts, or some of them, as soon as they are there."""
    for part in parts:
        print(f"# {part}")
        for name, make in PARTS[part](bench):
            if rows and name not in rows:
                continue
            row = make()
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
    return Bench(model, facts[:2], [facts[2], kept], text * 2, folder, 5_000)


def _answered(model: Model, fact: Fact) -> Fact:
    """The fact with the likeliest token for its target that text can give."""
    encoded = encode(model, fact)
    with torch.no_grad():
        logits = model.module(torch.tensor([encoded.prompt_ids])).logits[0, -1]
    for token in logits.argsort(descending=True).tolist():
        word = str(model.tokenizer.decode([token]))
        if model.tokenizer(fact.prompt + word).input_ids == [*encoded.prompt_ids, token]:
            return replace(fact, target=word, neighbours=())
    raise AssertionError("no token follows this prompt")


if __name__ == "__main__":
    main()
