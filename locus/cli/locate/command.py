"""`locus locate`: score the neurons or weights, and write a mask of those to edit."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from locus.cli.options import (
    Loading,
    MethodTokens,
    Running,
    Talking,
    method_class,
    method_settings,
    settings_from,
)

PartName = Literal["gate", "up", "down"]
ALL_PARTS: tuple[PartName, ...] = ("gate", "up", "down")
_CPU_TOKENS, _GPU_TOKENS = 512, 4096
"""Tokens of a batch that keep a device busy."""

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
    threshold: str | None = None,
    per_layer: Annotated[bool, Parameter(negative="")] = False,
    parts: Annotated[tuple[PartName, ...], Parameter(consume_multiple=True)] = ALL_PARTS,
    scores: Path | None = None,
    repetitions: int = 0,
    patience: float = 60.0,
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Score the neurons or weights by one method, and write a mask of the best; or compare several methods.

    Each method has options of its own: `locus methods NAME` shows them, with its formula and when to use it. Started
    by torchrun, several processes share the facts of one method.

    Args:
        model: Checkpoint folder, hub id, or smollm2.
        facts: What must go: a fact file, or demo-forget.
        out: The mask to write, a .safetensors file; for several methods a folder for their masks and report.html.
        method: The localizer; `locus methods` lists them. Several are written a,b,c (or all), with settings as
            b:steps=50:penalty=10.
        retain: What must stay: a fact file, or demo-retain. Some methods contrast the two.
        budget: How many neurons: a fraction (1%, 0.01) or a count (300).
        threshold: Instead of a budget: all whose score is above this number, or above what the method's paper
            has (paper).
        per_layer: Take that many from each layer instead of the whole model's best.
        parts: Which weights of a neuron: its key vectors (gate, up), its value vector (down).
        scores: Write the scores too, to this file.
        repetitions: With several methods: how often each is run again on other words, half of the facts, another
            seed, to see whether its mask stays.
        patience: Seconds a run may take to be repeated.
    """
    from locus.errors import InputError
    from locus.parallel.map import together
    from locus.parallel.ranks import asked_for, joined
    from tracing import LOCALIZERS

    if "," in method or ":" in method or method == "all":
        if asked_for():
            _refuse_many()
        if threshold is not None or scores is not None or tokens:
            wrong = (
                "--threshold" if threshold is not None else "--scores" if scores is not None else tokens[0]
            )
            raise InputError(
                f"{wrong}: not with several methods; write a method's settings as NAME:option=value, and scores "
                "are written for each"
            )
        from locus.cli.locate.several_localizers import compare_localizers

        chosen_methods = methods_of(method, running)
        loaded = loading.load(model)
        compare_localizers(
            out, loaded, running.facts(facts), facts, None if retain is None else _trainable(retain),
            chosen_methods, budget=budget, per_layer=per_layer, parts=parts, repetitions=repetitions,
            patience=patience, resume=running.resume, talking=talking,
        )  # fmt: skip
        return
    with joined() as ranks:
        talking = talking.of(ranks)
        chosen: Any = method_settings(
            f"locus locate --method {method}",
            method_class(LOCALIZERS, method, "localizer"),
            tokens,
            running.shared,
        )
        loaded = loading.load(model)
        forget = running.facts(facts)
        kept = None if retain is None else _trainable(retain)
        ranks.agree("facts, settings or weights", _asked(loaded, forget, kept, chosen, running))
        how = (budget, per_layer, parts, talking, threshold, running.batch_tokens)
        with talking.progress(), together(ranks):
            mask, scored = locate_mask(loaded, forget, kept, chosen, *how)
        if not ranks.first:
            return
        mask.save(out)
        if scores is not None:
            scored.save(scores)
        summary = describe(mask, loaded)
        talking.finish({"mask": str(out), **summary}, f"{out}: {summary['text']}")


def _refuse_many() -> None:
    """Several methods may be repeated for as long as patience lasts, which processes would not agree on."""
    from locus.errors import AlreadySaid, InputError

    if os.environ.get("RANK", "0") != "0":
        raise AlreadySaid
    raise InputError("locus locate with several methods runs in one process: start it without torchrun")


def _asked(
    model: Model, facts: Sequence[Fact], retain: Sequence[Fact] | None, localizer: Any, running: Running
) -> str:
    """What all processes must have been given alike."""
    given = [model.fingerprint, localizer, running.batch_tokens, list(facts), list(retain or ())]
    return hashlib.sha256(repr(given).encode()).hexdigest()


def methods_of(text: str, running: Running) -> dict[str, Any]:
    """Localizers by name, with settings, from `a,b:steps=50:penalty=10`.

    Raises:
        InputError: an unknown method, a method named twice, or a setting that is not name=value.
    """
    from locus.errors import InputError
    from tracing import LOCALIZERS

    found: dict[str, Any] = {}
    for spec in LOCALIZERS if text == "all" else text.split(","):
        name, *given = spec.strip().split(":")
        pairs = [one.partition("=") for one in given]
        if wrong := [one for one, (_, mark, _) in zip(given, pairs, strict=True) if not mark]:
            raise InputError(f"--method {spec}: {wrong[0]!r} is not a setting; write NAME:option=value")
        if name in found:
            raise InputError(f"--method {text}: {name} is named twice")
        cls: type[Any] = method_class(LOCALIZERS, name, "localizer")
        settings = {option: value for option, _, value in pairs}
        found[name] = settings_from(f"--method {spec}", cls, settings, running.shared)
    return found


def _trainable(path: str) -> list[Fact]:
    """The facts of a retain file that are not held out for judging."""
    from locus.fact import read_facts, trainable_facts

    return trainable_facts(read_facts(path))


def locate_mask(
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None,
    localizer: Any,
    budget: str,
    per_layer: bool,
    parts: Sequence[str],
    talking: Talking,
    threshold: str | None = None,
    batch_tokens: int | None = None,
) -> tuple[WeightMask, Any]:
    """Run a localizer and choose by a budget or a threshold; says first what it will cost.

    Without `batch_tokens` a batch holds what keeps the device busy and no more, so that several processes find
    enough of them to share; one process makes the same.
    """
    least = None if threshold is None else _threshold_of(localizer, threshold)
    talking.note(f"locate: {localizer.cost(model, facts, retain)}")
    at_once = batch_tokens or (_CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS)
    scored = localizer.run(model, facts, retain, batch_tokens=at_once)
    if least is not None:
        return scored.above_threshold(least, parts=parts), scored
    return scored.top(budget, per_layer=per_layer, parts=parts), scored


def _threshold_of(localizer: Any, threshold: str) -> float:
    """A threshold as a number; "paper" is the localizer's own."""
    from locus.errors import InputError
    from tracing.localizer import PublishedThreshold

    if threshold == "paper":
        if not isinstance(localizer, PublishedThreshold):
            raise InputError(
                f"--threshold paper: {type(localizer).__name__} has none of its own; give a number or a --budget"
            )
        return localizer.PAPER_THRESHOLD
    try:
        return float(threshold)
    except ValueError:
        raise InputError(f"--threshold {threshold}: give a number, or paper") from None


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
