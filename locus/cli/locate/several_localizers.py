"""Several localizers at once: `locus locate --method a,b,c` writes their masks, and how far they agree."""

from __future__ import annotations

import dataclasses
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
    """Write NAME.safetensors for each localizer, locate.json and report.html; on resume take up finished ones."""
    from locus.errors import InputError
    from locus.files.artefact import lock, save_json
    from locus.input_digest import input_digests
    from locus.report import locate_report
    from tracing.comparing.compare_localizers import mask_overlaps

    if (folder / "locate.json").exists() and not resume:
        raise InputError(f"{folder} holds a finished comparison: give another folder, or --resume")
    say_costs(model, facts, retain, localizers, talking)
    how = {"budget": budget, "per_layer": per_layer, "parts": list(parts)}
    more = {"repetitions": repetitions, "patience": patience}
    with lock(folder), talking.progress():
        rows: dict[str, LocatedRow] = {}
        masks: dict[str, WeightMask] = {}
        refused: dict[str, str] = {}
        for name, localizer in localizers.items():
            about = {
                **how,
                **more,
                "settings": json.loads(json.dumps(dataclasses.asdict(localizer))),
                "inputs": input_digests(
                    model, facts={"facts": facts, "retain facts": retain}, settings=localizer
                ),
            }
            try:
                done = _finished(folder, name, about) if resume else None
                rows[name], masks[name] = done or _one(folder, name, localizer, model, facts, retain, about)
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
    """Run one localizer and keep what it found."""
    from locus.files.artefact import save_json
    from locus.report.locate_report import LocatedRow
    from locus.scores import NeuronScores
    from tracing.comparing.compare_localizers import compare_localizer

    found = compare_localizer(
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
    record, path = _files(folder, name)
    record.unlink(missing_ok=True)  # of another mask
    found.mask.save(path)
    if isinstance(found.scores, NeuronScores):  # those of weights are as large as the model
        found.scores.save(folder / f"{name}.scores.safetensors")
    save_json(record, "located", {"about": dict(about), "row": dataclasses.asdict(row)})
    return row, found.mask


def _finished(folder: Path, name: str, about: Mapping[str, Any]) -> tuple[LocatedRow, WeightMask] | None:
    """What an earlier run made of the same inputs, settings and budget."""
    from locus.files.artefact import load_json
    from locus.mask import WeightMask
    from locus.report.locate_report import LocatedRow

    record, path = _files(folder, name)
    if not record.exists() or not path.exists():
        return None
    done = load_json(record, "located")
    return (LocatedRow(**done["row"]), WeightMask.load(path)) if done["about"] == about else None


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    """A localizer's record and its mask."""
    return folder / f"{name}.json", folder / f"{name}.safetensors"


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
