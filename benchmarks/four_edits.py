"""Four edits of the same 16 facts, each audited, and one page that says which of them to ship.

    python -m benchmarks.four_edits -o four_edits
    locus compare four_edits/*/audit -o four_edits

Full gradient ascent, NPO in all MLPs, NPO in the located 1 % of the neurons, and the 46 best located neurons switched
off, on SmolLM2-135M-Instruct. Finished edits and audits are taken as they are, so that a run that was stopped goes
on. Each audit goes through the attacks of --attacks; its p(target) is held against a plain pass over the edited
weights before any figure is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from locus.audit import Audit, AuditSettings, audit, read_audit
from locus.audit.compare import compare
from locus.audit.settings import DEFAULT_ATTACKS
from locus.delta import WeightDelta
from locus.fact import Fact, neutral_text, read_facts, split_text, trainable_facts
from locus.forward import measure
from locus.mask import WeightMask, shapes_of
from locus.model import Model, load_model

EDITS = ("ga-full", "npo-all-mlps", "npo-located", "neurons-zeroed")
ROWS = {
    "forget.prob": "p(target)",
    "paraphrase.top1": "paraphrases right",
    "prompts.any.top1": "right under some prompt",
    "held_out.top1": "held-out right",
    "neighbour.top1": "neighbours right",
    "text.kl": "KL on neutral text",
    "lens.top10": "in some layer's top 10",
    "relearn.prob": "p(target) after relearning",
    "int4.forget.prob": "p(target) in int4",
}


def how(name: str, model: Model, forget: list[Fact], retain: list[Fact]) -> tuple[Any, WeightMask]:
    """The editor and the mask of one of the four."""
    from editors import GA, NPO, Training
    from editors.neurons.neuron_edits import NeuronZero
    from tracing import AllNeurons, GradientSaliency

    match name:
        case "ga-full":
            every = WeightMask.of_parameters(["*"], shapes_of(model.module), model.fingerprint)
            return GA(training=Training(lr=2e-5)), every
        case "npo-all-mlps":
            slow = Training(lr=2e-5, min_steps=20)
            return NPO(training=slow), AllNeurons().run(model, forget).top("100%")
        case "npo-located":
            return NPO(), GradientSaliency().run(model, forget, retain).top("1%")
        case _:
            return NeuronZero(), GradientSaliency().run(model, forget, retain).top(46)


def edited(name: str, folder: Path, model: Model, forget: list[Fact], retain: list[Fact]) -> WeightDelta:
    """The edit, made or read back."""
    path = folder / "delta.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        editor, mask = how(name, model, forget, trainable_facts(retain))
        text, _ = split_text(neutral_text())
        editor.run(model, forget, retain, mask, text=text, folder=folder / ".resume", resume=True).save(path)
    return WeightDelta.load(path)


def judged(
    name: str,
    folder: Path,
    model: Model,
    forget: list[Fact],
    retain: list[Fact],
    before: Audit | None = None,
    attacks: tuple[str, ...] = DEFAULT_ATTACKS,
) -> Audit:
    """The audit of one edit; what an earlier one measured of the base is taken over, and its seconds counted."""
    delta = edited(name, folder, model, forget, retain)
    _, unseen = split_text(neutral_text())
    settings = AuditSettings(attacks=attacks)
    start, spent = time.perf_counter(), time.process_time()
    done = audit(model, {name: delta}, forget, retain, unseen, settings=settings, before=before)
    done.document()
    seconds = {"wall": time.perf_counter() - start, "processor": time.process_time() - spent}
    if before is not None:
        seconds["wall"] += before.base.seconds
        seconds["processor"] += before.base.processor_seconds
    _check(done, delta, model, forget)
    done.save(folder / "audit")
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return done


def _check(done: Audit, delta: WeightDelta, model: Model, forget: list[Fact]) -> None:
    """The audit's p(target) is that of a plain pass over the edited weights."""
    with delta.applied(model):
        plain = measure(model, forget).prob.mean().item()
    figure = done.document()["states"][1]["figures"]["forget.prob"]["mean"]
    assert abs(figure - plain) <= 1e-4 * max(plain, 1e-3), (figure, plain)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("four_edits"))
    parser.add_argument("--only", choices=EDITS, help="one of the four, so that they can be run in turn")
    parser.add_argument("--attacks", nargs="+", default=DEFAULT_ATTACKS)
    parser.add_argument("--stop-after", choices=("edit", "audit"), default="audit")
    args = parser.parse_args()
    model = load_model("smollm2")
    forget, retain = read_facts("demo-forget"), read_facts("demo-retain")
    names = (args.only,) if args.only else EDITS
    before = None
    for name in names:
        folder = args.out / name
        if args.stop_after == "edit":
            edited(name, folder, model, forget, retain)
        elif not (folder / "audit" / "audit.json").exists():
            before = judged(name, folder, model, forget, retain, before, tuple(args.attacks))
    if args.stop_after == "audit" and not args.only:
        report({name: read_audit(args.out / name / "audit") for name in EDITS}, args.out)


def report(documents: dict[str, dict[str, Any]], out: Path) -> None:
    """Print the table for README.md, and write the page."""
    from locus.report import compare_report

    states = {"base": next(iter(documents.values()))["states"][0]}
    states |= {name: doc["states"][1] for name, doc in documents.items()}
    print(f"| | {' | '.join(states)} |\n|---|{'---|' * len(states)}")
    for key, label in ROWS.items():
        means = [(state["figures"][key] or {}).get("mean") for state in states.values()]
        print(f"| {label} | {' | '.join('' if mean is None else f'{mean:.3g}' for mean in means)} |")
    seconds = {name: json.loads((out / name / "seconds.json").read_text()) for name in documents}
    for kind in ("processor", "wall"):
        print(f"| audit, {kind} seconds | | {' | '.join(f'{s[kind]:.0f}' for s in seconds.values())} |")
    side = compare(documents)
    print(f"\n{side.why}\n{compare_report(documents, out)}")


if __name__ == "__main__":
    main()
