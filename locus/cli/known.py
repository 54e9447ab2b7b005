"""`locus known`: which facts a model knows, and which it only half knows."""

from __future__ import annotations

import dataclasses
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
        min_prob: Also ask for at least this probability of the target.
    """
    from rich.table import Table

    from locus.fact import write_facts
    from locus.recall import known as measure_known
    from locus.recall import known_facts, summarize

    loaded = loading.load(model)
    chosen = running.facts(facts)
    with talking.progress():
        rows = measure_known(loaded, chosen)
    kept = known_facts(rows, min_prob)
    if out is not None:
        write_facts(out, kept)
    table = Table(box=None, pad_edge=False)
    table.add_column("fact")
    for heading in ("p(target)", "right", "paraphrases right", "neighbours right"):
        table.add_column(heading, justify="right")
    for row in rows:
        counts = [
            f"{sum(found)}/{len(found)}" if found else "" for found in (row.paraphrases, row.neighbours)
        ]
        table.add_row(row.fact.id, f"{row.prob:.3f}", "yes" if row.right else "no", *counts)
    table.caption = f"{len(kept)} of {len(rows)} facts known" + (f", written to {out}" if out else "")
    listed = [
        {
            "id": row.fact.id,
            "prob": row.prob,
            "right": row.right,
            "paraphrases": list(row.paraphrases),
            "neighbours": list(row.neighbours),
        }
        for row in rows
    ]
    summary = dataclasses.asdict(summarize(rows))
    talking.finish({"known": [fact.id for fact in kept], "summary": summary, "facts": listed}, table)
