"""`locus trace`: causal tracing, with heat maps and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from locus.cli.options import Loading, MethodTokens, Running, Talking, method_settings

if TYPE_CHECKING:
    from locus.fact import Fact
    from locus.model import Model
    from locus.parallel.ranks import Ranks
    from locus.trace import Trace, TracedSite
    from tracing import CausalTrace


def trace(
    model: str,
    facts: str,
    /,
    *tokens: MethodTokens,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Trace which states carry each fact: corrupt the subject, restore one state, see if the target returns.

    The tracer has options of its own (samples, noise, kinds of states ...): `locus methods causal-trace`.

    Args:
        model: Checkpoint folder, hub id, or smollm2.
        facts: A fact file, or demo-forget.
        out: Folder for trace.safetensors, trace.json, average.json, the logit lens, the pictures and report.html.
    """
    from locus.parallel.ranks import joined
    from tracing import CausalTrace

    settings = method_settings("locus trace", CausalTrace, tokens, running.shared)
    with joined() as ranks:
        talking = talking.of(ranks)
        loaded = loading.load(model)
        chosen = running.facts(facts)
        with ranks.hold(out), talking.progress():
            traced = trace_into(out, loaded, chosen, settings, running.resume, ranks)
    result = {
        "folder": str(out),
        "facts": len(traced),
        "report": str(out / "report.html"),
        "engine": traced.engines,
        "patched_forwards": traced.patched_forwards,
        "speed": traced.speed,
        **traced.average_total(),
        "sites": sites_of(traced),
    }
    talking.finish(result, _summary(traced, out))


def trace_into(
    folder: Path,
    model: Model,
    facts: Sequence[Fact],
    tracer: CausalTrace,
    resume: bool,
    ranks: Ranks | None = None,
) -> Trace:
    """Trace the facts and write everything that `locus trace` promises into a folder."""
    from locus.cli.lens import lens_into
    from locus.errors import InputError
    from locus.parallel.ranks import ALONE
    from locus.report import plot_trace, trace_report

    if (folder / "trace.safetensors").exists() and not resume:
        raise InputError(
            f"{folder} holds a finished trace: give another folder, or --resume to go on with it"
        )
    ranks = ranks or ALONE
    traced = tracer.run(model, facts, folder=folder, resume=resume, ranks=ranks)
    for fact in ranks.share(traced.facts, "heat maps"):
        plot_trace(fact, folder / f"{fact.fact_id}.png", tracer.window)
    lens_into(folder, model, facts, ranks=ranks)
    ranks.barrier()
    if ranks.first:
        trace_report(traced, folder)
    return traced


_SITES = ("early, subject", "late, last token")
"""The two places of Meng et al. 2022; what is restored behind the last layer is not one of them."""


def _shown(site: TracedSite | None) -> str:
    return "-" if site is None else f"{site.share:.0%} at layer {site.layer}, {site.token!r}"


def sites_of(traced: Trace) -> dict[str, dict[str, dict[str, Any]]]:
    """Fact -> kind -> its early and its late site; null where there is none."""
    return {
        fact.fact_id: {
            kind: {
                name: None if site is None else asdict(site)
                for name, site in (("early", fact.early_site(kind)), ("late", fact.late_site(kind)))
            }
            for kind in fact.kinds
        }
        for fact in traced
    }


def _summary(traced: Trace, folder: Path) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in (
        "fact",
        "p clean",
        "p corrupted",
        *(f"{kind}: {where}" for kind in traced.kinds for where in _SITES),
    ):
        table.add_column(name, justify="left" if name == "fact" else "right")
    for fact in traced:
        sites = [
            _shown(site) for kind in traced.kinds for site in (fact.early_site(kind), fact.late_site(kind))
        ]
        table.add_row(fact.fact_id, f"{fact.clean_prob:.3f}", f"{fact.corrupted_prob:.3f}", *sites)
    speed = traced.speed
    how = f"{traced.patched_forwards:,} patched forwards, engine {', '.join(traced.engines)}"
    if "tokens_per_second" in speed:
        how += f", {speed['seconds']:.1f} s, {speed['tokens_per_second']:,.0f} tokens/s"
    if "fraction_of_matrix_peak" in speed:
        how += f", {speed['fraction_of_matrix_peak']:.0%} of the machine's matrix peak"
    table.caption = f"{how}\nheat maps and the average effect: {folder / 'report.html'}"
    return table
