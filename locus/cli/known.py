"""`locus known`: which facts a model knows, and which it only half knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from locus.cli.options import Loading, Running, Talking


def known(
    model: str,
    facts: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    min_prob: float = 0.0,
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Measure which facts a model knows: probability, first choice, paraphrases, neighbours.

    Args:
        model: Checkpoint folder, hub id, or smollm2.
        facts: Fact file, or demo-forget / demo-retain.
        out: Write the facts that the model answers right to this JSONL file.
        min_prob: Ask for at least this probability of the target besides.
    """
    from rich.table import Table

    from locus.fact import write_facts
    from locus.known import known as measure_known

    loaded = loading.load(model)
    chosen = running.facts(facts)
    with talking.progress():
        rows = measure_known(loaded, chosen)
    kept = [fact for fact, row in zip(chosen, rows, strict=True) if row.correct and row.prob >= min_prob]
    if out is not None:
        write_facts(out, kept)
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("fact", "left"), ("p(target)", "right"), ("right", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("paraphrases", justify="right")
    table.add_column("neighbours", justify="right")
    for row in rows:
        table.add_row(
            row.id,
            f"{row.prob:.3f}",
            "yes" if row.correct else "no",
            str(row.paraphrases),
            str(row.neighbours),
        )
    table.caption = f"{len(kept)} of {len(rows)} facts known" + (f", written to {out}" if out else "")
    talking.finish({"known": [f.id for f in kept], "facts": [r.to_json() for r in rows]}, table)
