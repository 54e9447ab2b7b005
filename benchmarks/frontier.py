"""Which objective, and where? Forgetting against what it costs, every arm at its own best rate and at equal forgetting.

    python -m benchmarks.frontier                          16 facts, all objectives and places; hours on two cores
    python -m benchmarks.frontier --objectives npo dpo --places saliency random-0 full
    python -m benchmarks.frontier --case tofu --tofu FOLDER        forget01, beside a model that never saw it
    python -m benchmarks.frontier --table                  what is finished so far, without running anything
    python -m benchmarks.frontier --table --picture frontier.png       and draws it

An arm is an objective and a place: 1 % of the neurons by one of three localizers (saliency also as 1 % of each layer's)
or at random (three seeds), all MLPs, or every weight. All arms share the retain term (KL on 8 facts and a paragraph a
step, weight 5) and the number of steps; AdamW's rate is found per arm on other facts than the reported ones
(`frontier_cases`): from the usual rate of a place it is doubled for as long as that helps. NPO climbs so at each place,
every objective in the neurons of `saliency`; at other places an objective takes NPO's rate there, times its own factor
over NPO. Random seeds share one. Beside them stand edits without training, as their defaults have them (not for TOFU,
whose questions name no subject).

Arms are compared at equal forgetting: an edit's change is made smaller or larger until the mean p(target) is
0.01 (strength 1 is the edit as trained, at most 1.5); one that cannot reach it is reported at strength 1
and marked. The change is then audited (`locus.audit`): paraphrases, held-out facts, neighbours, KL on unseen text,
the logit lens, relearning on half of the facts. TOFU's edits take the rates found on facts, and are compared where a
model that never saw the forgotten answers stands (`frontier_tofu`). Intervals are the audit's (95 %); for random masks
the smallest and the largest of the seeds. Seconds are processor time of one thread, the localizer's not included.
Finished arms and masks are kept in --out, so that a run that was stopped goes on there; several processes may share it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.inj import Lines
from benchmarks.lib.frontier_cases import Case, Questions, facts_case
from benchmarks.lib.frontier_picture import Dot, draw
from benchmarks.lib.frontier_strength import equal_forgetting
from benchmarks.lib.frontier_tofu import tofu_case
from editors import EDITORS, OBJECTIVES
from editors.deltas import scaled, settings_of
from editors.training.retain import Retain
from locus.audit.neutral_text import read_text
from locus.audit.questions import Questions as Asked
from locus.audit.questions import ask
from locus.audit.run import ask_about
from locus.audit.state import State
from locus.delta import WeightDelta
from locus.embedded import cache_folder
from locus.fact import trainable_facts
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from locus.tokens import encode_text
from tracing import AllNeurons, GradientSaliency, Imprint, KnowledgeNeurons, RandomNeurons

STEPS = 20
NAMES = ("npo", "rkld", "simnpo", "dpo", "kl-min", "undial")
DIRECT = ("memit", "alphaedit", "rome")
"""Edits without training, as their defaults have them, in the layers that they choose themselves."""
OWN = "their own layers"
SEEDS = 3
PLACES = (
    "saliency",
    "saliency-per-layer",
    "knowledge-neurons",
    "imprint",
    *(f"random-{i}" for i in range(SEEDS)),
    "all-mlps",
    "full",
)
MOST_DOUBLINGS = 4
JUDGED = 6
"""Paragraphs that tell the KL of a rate that is tried; they may have been trained on."""
USUAL = {"all-mlps": 2e-5, "full": 2e-5}
NEURONS_RATE = 1e-3
"""Usual rate of 1 % of the neurons."""
RETAIN = Retain(term="kl", weight=5.0, facts=8, reference="disk")


def kind_of(place: str) -> str:
    """Seeds of a random mask are one kind."""
    return "random" if place.startswith("random-") else place


def usual(place: str) -> float:
    """The lowest rate that is tried."""
    return USUAL.get(place, NEURONS_RATE)


def mask_of(place: str, model: Model, asked: Questions, points: int = 20) -> WeightMask:
    """The weights of a place, located on the questions' forget facts; `points` of knowledge neurons' integrals."""
    if place == "full":
        return WeightMask.of_parameters(["*"], shapes_of(model.module), model.fingerprint)
    if place == "all-mlps":
        return AllNeurons().run(model, asked.forget).top("100%")
    localizer: Any = {
        "saliency": GradientSaliency(),
        "saliency-per-layer": GradientSaliency(),
        "knowledge-neurons": KnowledgeNeurons(refine=False, steps=points),
        "imprint": Imprint(),
    }.get(place) or RandomNeurons(seed=int(place.removeprefix("random-")))
    kept = trainable_facts(asked.retain)
    mask: WeightMask = localizer.run(model, asked.forget, kept).top(
        "1%", per_layer=place.endswith("per-layer")
    )
    return mask


def editor_of(name: str, rate: float, case: Case) -> Any:
    """A direct edit as it is; an objective but for rate, steps, what a step sees, and the shared retain term."""
    if name in DIRECT:
        return EDITORS[name]()
    made = OBJECTIVES[name]()
    training = replace(
        made.training, steps=STEPS, min_steps=STEPS, lr=rate, utility=0.0, max_kl=0.0,
        forget_per_step=case.forget_per_step,
    )  # fmt: skip
    return replace(made, retain=replace(RETAIN, facts=case.retain_facts), training=training)


@dataclass(frozen=True, eq=False)
class Bench:
    """A case, and what is finished of it."""

    case: Case
    lines: Lines
    rates: Bench | None = None
    """Where rates come from, if not from questions of the case's own."""

    @cached_property
    def mask(self) -> Callable[[str, Questions], WeightMask]:
        """Masks are located once, and what a localizer found is kept beside the lines."""
        return cache(self._located)

    def _located(self, place: str, asked: Questions) -> WeightMask:
        case = self.case
        name = f"{case.name}-{case.model.fingerprint[:12]}-{asked.name}-{place}-{case.points}.safetensors"
        path = self.lines.folder / "masks" / name
        if path.exists():
            return WeightMask.load(path)
        mask = mask_of(place, case.model, asked, case.points)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask.save(path)
        return mask

    def may_change(self, name: str, place: str, asked: Questions) -> WeightMask:
        """The mask of an arm."""
        if place != OWN:
            return self.mask(place, asked)
        own: WeightMask = editor_of(name, 0.0, self.case).own_mask(self.case.model)
        return own

    def edit(self, name: str, place: str, asked: Questions, rate: float) -> tuple[WeightDelta, float]:
        """The change, and the processor seconds it took."""
        mask = self.may_change(name, place, asked)
        started = time.process_time()
        delta: WeightDelta = editor_of(name, rate, self.case).run(
            self.case.model, asked.forget, asked.retain, mask, text=self.case.text
        )
        return delta, time.process_time() - started

    def key(self, what: str, *more: object) -> dict[str, Any]:
        """Of one finished thing."""
        retain = asdict(replace(RETAIN, facts=self.case.retain_facts))
        return {
            "case": self.case.name,
            "model": self.case.model.fingerprint[:12],
            "what": what,
            "of": list(more),
            "steps": STEPS,
            "retain": {name: value for name, value in retain.items() if name != "reference"},
        }

    def tried(self, name: str, place: str, rate: float, run: bool = True) -> dict[str, Any] | None:
        """What one rate does on the tuning questions at equal forgetting; None where that would have to be run."""
        key = self.key("rate", name, kind_of(place), rate)
        found = self.lines.get(key)
        if found is None and run:
            asked = self.case.tuning
            assert asked is not None, "a case without tuning questions takes its rates from another"
            delta, seconds = self.edit(name, place, asked, rate)
            questions = ask_about(self.case.model, asked.forget, asked.retain)
            strength, prob = equal_forgetting(self.case, delta, questions["forget"])
            at = delta if strength is None else scaled(self.case.model, delta, strength)
            found = {"strength": strength, "prob": prob, "seconds": seconds}
            found |= self.judged(State("tried", "edit", self.case.model, at), questions)
            self.lines.add(key, found)
            print("tried", name, kind_of(place), f"{rate:g}", found, file=sys.stderr, flush=True)
        return found

    def judged(self, tried: State, questions: Mapping[str, Asked]) -> dict[str, Any]:
        """What an edit of the tuning questions keeps."""
        with tried.active() as edited:
            right = {
                kind: float(ask(edited, questions[kind]).correct.float().mean())
                for kind in ("paraphrase", "held_out", "neighbour")
                if kind in questions
            }
        pieces = [p for text in self.case.text[:JUDGED] for p in encode_text(tried.model, text)]
        read = read_text((State("base", "base", tried.model), tried), pieces)
        return {"right": right, "kl": float(read[tried.name].kl.mean())}

    def best_rate(self, name: str, place: str, run: bool = True) -> float | None:
        """The rate that keeps most on the tuning questions, at equal forgetting; None where something is not run."""
        best, most = usual(place), -math.inf
        for doublings in range(MOST_DOUBLINGS + 1):
            rate = usual(place) * 2**doublings
            found = self.tried(name, place, rate, run)
            if found is None:
                return None
            if merit(found) <= most:
                break
            best, most = rate, merit(found)
        return best

    def rate(self, name: str, place: str, run: bool = True) -> float | None:
        """See the module; a direct edit has none."""
        if name in DIRECT:
            return 0.0
        if self.rates is not None:
            return self.rates.rate(name, place, run=False)
        if name == "npo" or kind_of(place) == "saliency":
            return self.best_rate(name, place, run)
        pairs = ((name, "saliency"), ("npo", "saliency"), ("npo", place))
        own, of_npo, there = (self.best_rate(*pair, run) for pair in pairs)
        return None if own is None or of_npo is None or there is None else own / of_npo * there

    def arm(self, name: str, place: str) -> dict[str, Any]:
        """The reported figures of one arm, made or taken from an earlier run."""
        rate = self.rate(name, place)
        if rate is None:
            raise SystemExit(f"{name} in {place}: no rate yet; run it with --case facts first")
        key = self.arm_key(name, place, rate)
        found = self.lines.get(key)
        if found is None:
            asked, model = self.case.reported, self.case.model
            mask = self.may_change(name, place, asked)
            delta, seconds = self.edit(name, place, asked, rate)
            encoded = ask_about(model, asked.forget, asked.retain)["forget"]
            strength, _ = equal_forgetting(self.case, delta, encoded)
            at = delta if strength is None else scaled(model, delta, strength)
            del delta
            found = {"rate": rate, "strength": strength, "seconds": seconds, "weights": mask.n_weights}
            found["figures"] = self.case.judge(at, mask)
            self.lines.add(key, found)
            print("arm", name, place, found, file=sys.stderr, flush=True)
        return found

    def arm_key(self, name: str, place: str, rate: float) -> dict[str, Any]:
        """A direct edit is as its defaults have it, so its arm is another when these change."""
        own = [settings_of(editor_of(name, rate, self.case))] if name in DIRECT else []
        return self.key("arm", name, place, rate, *own)

    def beside(self, run: bool = True) -> Mapping[str, Any]:
        """Figures of the models that are not edited; none where that would have to be run."""
        key = self.key("beside")
        found = self.lines.get(key)
        if found is None and run:
            found = dict(self.case.beside())
            self.lines.add(key, found)
        return found or {}

    def finished(self, name: str, place: str) -> dict[str, Any] | None:
        """The arm's figures, if all of it is there already."""
        rate = self.rate(name, place, run=False)
        return None if rate is None else self.lines.get(self.arm_key(name, place, rate))


def merit(found: dict[str, Any]) -> float:
    """Held-out facts and neighbours right, paraphrases wrong, each up to 1, less five times the KL in nats a token.

    Far below all others where forgetting was missed.
    """
    right: dict[str, float] = found["right"]
    kept = right.get("held_out", 0.0) + right.get("neighbour", 0.0) + 1 - right.get("paraphrase", 0.0)
    kept -= 5 * float(found["kl"])
    missed = found["strength"] is None
    return kept - 10 * (1 + float(found["prob"])) if missed else kept


def cell(figures: Sequence[dict[str, Any] | None]) -> str:
    """A mean with its interval; over several arms the mean of the means, their least and greatest."""
    present = [f for f in figures if f is not None and f["mean"] is not None]
    if not present:
        return ""
    means = [f["mean"] for f in present]
    mean = sum(means) / len(means)
    low, high = (
        (min(means), max(means)) if len(means) > 1 else (present[0].get("low"), present[0].get("high"))
    )
    text = f"{mean:.3g}" if mean < 0.1 else f"{mean:.2f}"
    return text if low is None else f"{text} [{low:.2g}, {high:.2g}]"


Row = tuple[str, str, list[dict[str, Any]]]
"""Objective, kind of place, and the finished arms."""


def rows(bench: Bench, names: Sequence[str], places: Sequence[str]) -> Iterator[Row]:
    """What is finished; seeds of random masks in one row."""
    for name in names:
        for kind in [OWN] if name in DIRECT else dict.fromkeys(map(kind_of, places)):
            alike = [place for place in [*places, OWN] if kind_of(place) == kind]
            if arms := [arm for place in alike if (arm := bench.finished(name, place)) is not None]:
                yield name, kind, arms


def table(bench: Bench, found: Iterable[Row]) -> str:
    """Markdown, a line a row."""
    lines = [f"| objective | where | rate | strength | {' | '.join(bench.case.columns.values())} | s |"]
    lines.append("|" + "---|" * (len(bench.case.columns) + 5))
    for state, figures in bench.beside(run=False).items():
        cells = [cell([figures[column]]) for column in bench.case.columns]
        lines.append(f"| {state} | | | | {' | '.join(cells)} | |")
    for name, kind, arms in found:
        missed = sum(arm["strength"] is None for arm in arms)
        strength = sum(arm["strength"] or 1.0 for arm in arms) / len(arms)
        cells = [cell([arm["figures"][column] for arm in arms]) for column in bench.case.columns]
        seconds = sum(arm["seconds"] for arm in arms) / len(arms)
        seeds = "one seed" if len(arms) == 1 else f"{len(arms)} seeds"
        label = f"{kind} ({seeds})" if kind == "random" else kind
        mark = f" ({missed} missed)" if missed else ""
        rate = f"{arms[0]['rate']:.0e}" if arms[0]["rate"] else ""
        lines.append(
            f"| {' | '.join([name, label, rate, f'{strength:.2f}{mark}', *cells, f'{seconds:.0f}'])} |"
        )
    return "\n".join(lines)


def picture(bench: Bench, found: Iterable[Row], path: Path) -> None:
    """The same rows, but for intervals (`frontier_picture`)."""
    panels = bench.case.panels

    def means(states: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        measured = [key for key in (bench.case.kl, *panels) if all(figures[key] for figures in states)]
        return {key: sum(figures[key]["mean"] for figures in states) / len(states) for key in measured}

    dots = [
        Dot(name, kind, any(a["strength"] is None for a in arms), means([a["figures"] for a in arms]))
        for name, kind, arms in found
    ]
    beside = {state: means([figures]) for state, figures in bench.beside(run=False).items()}
    draw(dots, bench.case.kl, panels, beside, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Tune, edit, judge, print; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=("facts", "tofu"), default="facts")
    parser.add_argument("--tofu", type=Path, help="TOFU's folder as downloaded")
    parser.add_argument("--epochs", type=int, default=5, help="passes over TOFU's questions when teaching")
    parser.add_argument("--objectives", nargs="+", choices=(*OBJECTIVES, *DIRECT))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--picture", type=Path, help="draw what is finished besides")
    parser.add_argument("--out", type=Path, default=cache_folder() / "frontier")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.case == "tofu" and args.tofu is None:
        parser.error("--case tofu needs --tofu FOLDER")
    bench = Bench(facts_case(), Lines(args.out / "facts.jsonl"))
    if args.case == "tofu":
        bench = Bench(tofu_case(args.tofu, args.epochs), Lines(args.out / "tofu.jsonl"), bench)
    objectives = args.objectives or (*NAMES, *(DIRECT if args.case == "facts" else ()))
    if not args.table:
        bench.beside()
        for name in objectives:
            for place in [OWN] if name in DIRECT else args.places:
                bench.arm(name, place)
    found = list(rows(bench, objectives, args.places))
    print(table(bench, found), flush=True)
    if args.picture is not None:
        picture(bench, found, args.picture)


if __name__ == "__main__":
    main()
