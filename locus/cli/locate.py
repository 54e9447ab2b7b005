"""`locus locate`: score the neurons or weights, and write a mask of those to edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from locus.cli.options import Loading, MethodTokens, Running, Talking, method_class, settings_of

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")

if TYPE_CHECKING:
    from collections.abc import Sequence

    from locus.fact import Fact
    from locus.mask import WeightMask
    from locus.model import Model


def locate(
    model: str,
    facts: str,
    /,
    *tokens: MethodTokens,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    method: str = "saliency",
    retain: str | None = None,
    budget: str = "1%",
    per_layer: Annotated[bool, Parameter(negative="")] = False,
    parts: Annotated[tuple[Part, ...], Parameter(consume_multiple=True)] = PARTS,
    scores: Path | None = None,
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Score the neurons or weights by one method, and write a mask of the best.

    Each method has options of its own: `locus methods NAME` shows them.

    Args:
        model: Checkpoint folder, hub id, or smollm2.
        facts: What must go: a fact file, or demo-forget.
        out: The mask to write, a .safetensors file.
        method: The localizer; `locus methods` lists them.
        retain: What must stay: a fact file, or demo-retain. Some methods contrast the two.
        budget: How many neurons: a fraction (1%, 0.01) or a count (300).
        per_layer: Take that many from each layer instead of the whole model's best.
        parts: Which weights of a neuron: gate row, up row, down column.
        scores: Write the scores themselves to this file besides.
    """
    from tracing import LOCALIZERS

    chosen: Any = settings_of(
        f"locus locate --method {method}",
        method_class(LOCALIZERS, method, "localizer"),
        tokens,
        running.shared,
    )
    loaded = loading.load(model)
    forget = running.facts(facts)
    kept = None if retain is None else _trainable(retain)
    with talking.progress():
        mask, scored = locate_mask(loaded, forget, kept, chosen, budget, per_layer, parts, talking)
    mask.save(out)
    if scores is not None:
        scored.save(scores)
    summary = describe(mask, loaded)
    talking.finish({"mask": str(out), **summary}, f"{out}: {summary['text']}")


def _trainable(path: str) -> list[Fact]:
    """The facts of a retain file that are not held out for judging."""
    from locus.fact import read_facts

    return [fact for fact in read_facts(path) if not fact.held_out]


def locate_mask(
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None,
    localizer: Any,
    budget: str,
    per_layer: bool,
    parts: Sequence[str],
    talking: Talking,
) -> tuple[WeightMask, Any]:
    """Run a localizer and cut its scores at a budget; says first what it will cost."""
    cost = localizer.cost(model, facts, retain)
    talking.note(f"locate: {cost.forwards:,} forward and {cost.backwards:,} backward passes of one example")
    scored = localizer.run(model, facts, retain)
    return scored.top(budget, per_layer=per_layer, parts=parts), scored


def describe(mask: WeightMask, model: Model) -> dict[str, Any]:
    """How much of the model a mask holds, and where it lies."""
    from locus.mask import shapes_of

    neurons = mask.neurons_per_layer(model.atlas)
    busiest = [int(layer) for layer in neurons.argsort(descending=True, stable=True)[:3] if neurons[layer]]
    fraction = mask.fraction(shapes_of(model.module))
    where = ", ".join(f"layer {layer}: {int(neurons[layer])}" for layer in busiest)
    text = f"{int(neurons.sum()):,} neurons, {mask.n_weights:,} weights ({fraction:.2%} of the model)"
    return {
        "neurons": int(neurons.sum()),
        "weights": mask.n_weights,
        "fraction": fraction,
        "neurons_per_layer": [int(n) for n in neurons],
        "text": text + (f"; most in {where}" if where else ""),
    }
