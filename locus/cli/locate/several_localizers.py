"""Several localizers at once: `locus locate --method a,b,c` writes their masks, and how far they agree."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from locus.cli.options import Talking
    from locus.fact import Fact
    from locus.mask import WeightMask
    from locus.model import Model
    from locus.report.locate_report import LocatedRow

REFUSED = "refused"


def compare_localizers(
    folder: Path,
    model: Model,
    facts: Sequence[Fact],
    facts_name: str,
    retain: Sequence[Fact] | None,
    localizers: Mapping[str, Any],
    *,
    budget: str,
    per_layer: bool,
    parts: Sequence[str],
    repetitions: int,
    patience: float,
    resume: bool,
    talking: Talking,
) -> None:
    """Write NAME.safetensors for each localizer, locate.json and report.html; finished ones are taken again."""
    from locus.errors import InputError
    from locus.files.artefact import lock, save_json
    from locus.report import locate_report
    from tracing.comparing.compare_localizers import mask_overlaps

    if (folder / "locate.json").exists() and not resume:
        raise InputError(f"{folder} holds a finished comparison: give another folder, or --resume")
    say_costs(model, facts, retain, localizers, talking)
    how = {"budget": budget, "per_layer": per_layer, "parts": list(parts)}
    more = {"repetitions": repetitions, "patience": patience, "of": _digest(model, facts, retain)}
    with lock(folder), talking.progress():
        rows: dict[str, LocatedRow] = {}
        masks: dict[str, WeightMask] = {}
        refused: dict[str, str] = {}
        for name, localizer in localizers.items():
            about = {**how, **more, "settings": json.loads(json.dumps(dataclasses.asdict(localizer)))}
            try:
                rows[name], masks[name] = _one(folder, name, localizer, model, facts, retain, about)
            except InputError as reason:
                refused[name] = str(reason)
                talking.note(f"{name}: {reason}")
    if not rows:
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    overlaps = mask_overlaps(list(masks.values())).tolist()
    chance = _chance(masks, model)
    page = locate_report(
        folder / "report.html",
        list(rows.values()),
        overlaps,
        {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "facts": facts_name,
            "n_facts": len(facts),
            "relations": sorted({fact.relation for fact in facts if fact.relation}),
            "budget": budget,
            "chance": f"{chance:.2f}",
            REFUSED: refused,
        },
    )
    result = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "facts": len(facts),
        **how,
        "methods": {name: dataclasses.asdict(row) for name, row in rows.items()},
        "overlap": {
            name: dict(zip(rows, line, strict=True)) for name, line in zip(rows, overlaps, strict=True)
        },
        REFUSED: refused,
    }
    save_json(folder / "locate.json", "locate", result)
    talking.finish({"folder": str(folder), "report": str(page), **result}, _table(rows, refused, page))


def say_costs(
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None,
    localizers: Mapping[str, Any],
    talking: Talking,
) -> None:
    """What each will take, before anything runs."""
    for name, localizer in localizers.items():
        talking.note(f"{name}: {localizer.cost(model, facts, retain)}")


def _one(
    folder: Path,
    name: str,
    localizer: Any,
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact] | None,
    about: Mapping[str, Any],
) -> tuple[LocatedRow, WeightMask]:
    """Run one localizer, or take what an earlier run of the same settings left."""
    from locus.files.artefact import load_json, save_json
    from locus.mask import WeightMask
    from locus.report.locate_report import LocatedRow
    from locus.scores import NeuronScores
    from tracing.comparing.compare_localizers import survey

    record, path = folder / f"{name}.json", folder / f"{name}.safetensors"
    if record.exists() and path.exists():
        done = load_json(record, "located")
        if done["about"] == about:
            return LocatedRow(**done["row"]), WeightMask.load(path)
    found = survey(
        localizer,
        model,
        facts,
        retain,
        budget=about["budget"],
        per_layer=about["per_layer"],
        parts=about["parts"],
        repetitions=about["repetitions"],
        patience=about["patience"],
    )
    row = LocatedRow(
        name=name,
        about=(type(localizer).__doc__ or "").strip().split("\n")[0],
        neurons_per_layer=[int(n) for n in found.mask.neurons_per_layer(model.atlas)],
        n_weights=found.mask.n_weights,
        cost=str(found.cost),
        seconds=found.seconds,
        stability={
            over: {"mean": s.mean, "low": s.low, "high": s.high, "chance": s.chance, "n": len(s.pairs)}
            for over, s in found.stability.items()
        },
        skipped=found.skipped,
    )
    found.mask.save(path)
    if isinstance(found.scores, NeuronScores):  # those of weights are as large as the model
        found.scores.save(folder / f"{name}.scores.safetensors")
    save_json(record, "located", {"about": dict(about), "row": dataclasses.asdict(row)})
    return row, found.mask


def _digest(model: Model, facts: Sequence[Fact], retain: Sequence[Fact] | None) -> str:
    """What was asked of which model."""
    text = json.dumps([model.fingerprint, [_words(f) for f in facts], [_words(f) for f in retain or ()]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _words(fact: Fact) -> list[Any]:
    return [fact.prompt, fact.target, fact.subject, *fact.paraphrases]


def _chance(masks: Mapping[str, WeightMask], model: Model) -> float:
    """Overlap of two random masks of the first one's share of the neurons."""
    n_neurons = int(next(iter(masks.values())).neurons_per_layer(model.atlas).sum())
    return n_neurons / (model.atlas.n_layers * model.atlas.d_mlp)


def _table(rows: Mapping[str, LocatedRow], refused: Mapping[str, str], page: Path) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("localizer", no_wrap=True)
    for column in ("neurons", "weights", "seconds", "other words", "half the facts", "other seed"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        stable = [row.stability.get(over) for over in ("paraphrases", "facts", "seeds")]
        cells = ["" if s is None else f"{s['mean']:.2f}" for s in stable]
        table.add_row(
            name, f"{sum(row.neurons_per_layer):,}", f"{row.n_weights:,}", f"{row.seconds:.1f}", *cells
        )
    lines = [f"the last three: overlap of a mask with itself, made again; of every two masks: {page}"]
    lines += [f"refused: {name}: {reason}" for name, reason in refused.items()]
    table.caption = "\n".join(lines)
    table.caption_justify = "left"
    return table
