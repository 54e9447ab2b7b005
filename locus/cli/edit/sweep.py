"""`locus edit --sweep`: forgetting against utility over the size of the mask and the strength of the edit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from locus.cli.edit.controls import Wanted
    from locus.delta import WeightDelta
    from locus.fact import Fact
    from locus.model import Model
    from locus.report.pareto_plot import SweepPoint
    from locus.scores import NeuronScores
    from locus.tokens import Encoded

POINTS, PICTURE = "sweep.json", "sweep.png"

_SWEEP = Group("Sweep", sort_key=9)


@Parameter(name="*", group=_SWEEP)
@dataclass(frozen=True)
class Sweeping:
    """What is swept."""

    sweep: Path | None = None
    """Neuron scores (what `locus locate --scores` wrote): edit at several sizes and strengths; takes no --mask."""
    budgets: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("0.3%", "1%", "3%")
    """Sizes of the mask."""
    strengths: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (0.5, 0.75, 1.0, 1.25)
    """How many times the trained change; one training serves them all."""


@dataclass(frozen=True, eq=False)
class SweepJudge:
    """What every point of a sweep is asked."""

    model: Model
    forget: list[Encoded]
    held_out: list[Encoded]
    """Facts that no edit sees and that the base has right."""
    text: list[Encoded]

    @classmethod
    def of(
        cls, model: Model, forget: Sequence[Fact], retain: Sequence[Fact], text: Sequence[str]
    ) -> SweepJudge:
        """Encode the questions.

        Raises:
            InputError: no held-out fact that the base has right.
        """
        from locus.errors import InputError
        from locus.fact import held_out_facts
        from locus.forward import measure
        from locus.tokens import encode, encode_text

        held_out = [encode(model, fact) for fact in held_out_facts(retain)]
        right = measure(model, held_out).correct.tolist()
        held_out = [one for one, is_right in zip(held_out, right, strict=True) if is_right]
        if not held_out:
            raise InputError(
                "--sweep: utility is judged by retain facts marked held_out that the model has right; there are none"
            )
        asked = [example for fact in forget for example in (fact.example, *fact.paraphrase_examples)]
        pieces = [piece for paragraph in text for piece in encode_text(model, paragraph)]
        return cls(model, [encode(model, example) for example in asked], held_out, pieces)

    def ask(self, deltas: Mapping[str, WeightDelta]) -> dict[str, dict[str, float]]:
        """The figures of several edits, by name; the base reads the text once for all."""
        from locus.audit.neutral_text import read_text
        from locus.audit.state import State
        from locus.forward import measure

        states = [State(name, "edit", self.model, delta) for name, delta in deltas.items()]
        texts = read_text((State("base", "base", self.model), *states), self.text)
        found = {}
        for state in states:
            with state.active() as edited:
                forgotten, kept = measure(edited, self.forget), measure(edited, self.held_out)
            found[state.name] = {
                "forget_prob": float(forgotten.prob.mean()),
                "forget_correct": float(forgotten.correct.float().mean()),
                "utility": float(kept.correct.float().mean()),
                "kl": float(texts[state.name].kl.mean()),
            }
        return found


def sweep_into(
    out: Path,
    model: Model,
    facts: tuple[Sequence[Fact], Sequence[Fact], tuple[list[str], list[str]]],
    scores: NeuronScores,
    editor: tuple[str, Any],
    controls: Wanted,
    sweeping: Sweeping,
    resume: bool,
    note: Callable[[str], None],
) -> list[SweepPoint]:
    """Edit at every budget, with the best neurons and with random ones, and ask at every strength.

    Each edit has a folder of its own; finished edits and points are taken as they are on resume.

    Args:
        out: Folder for the edits, sweep.json and sweep.png.
        model: The base.
        facts: To forget, to keep, and neutral paragraphs (to train on, unseen).
        scores: The neurons' ranking.
        editor: Name and settings of the method.
        controls: Random masks of equal size beside each located one.
        sweeping: Budgets and strengths.
        resume: Go on from what is there.
        note: Says why controls could not be made.
    """
    from editors.deltas import scaled
    from locus.cli.edit.controls import Edited, make_controls
    from locus.cli.edit.edit_folder import edit_into
    from locus.errors import InputError
    from locus.files.artefact import load_json, save_json
    from locus.input_digest import digest_of, model_digests
    from locus.report.pareto_plot import SweepPoint, plot_front

    forget, retain, (training_text, unseen) = facts
    method, settings = editor
    if (out / POINTS).exists() and not resume:
        raise InputError(f"{out} holds a sweep: give another folder, or --resume to go on with it")
    known = load_json(out / POINTS, "sweep")["points"] if (out / POINTS).exists() else {}
    judge = SweepJudge.of(model, forget, retain, unseen)
    asked = digest_of([model_digests(model), judge.forget, judge.held_out, judge.text])
    points: list[SweepPoint] = []
    for budget in sweeping.budgets:
        located = scores.top(budget)
        folder = out / budget.replace("%", "-percent")
        made = partial(
            edit_into,
            model=model,
            forget=forget,
            retain=retain,
            text=training_text,
            method=method,
            resume=resume,
        )
        delta = made(folder, mask=located, editor=settings)
        beside, why = make_controls(folder, Edited(model, settings, located, delta), controls, made)
        if why:
            note(f"controls of {budget}: {why}")
        for number, one in zip((None, *range(len(beside))), (delta, *beside), strict=True):
            keys = {s: json.dumps([budget, number, s, one.id, asked]) for s in sweeping.strengths}
            if new := {key: scaled(model, one, s) for s, key in keys.items() if key not in known}:
                known |= judge.ask(new)
                save_json(out / POINTS, "sweep", {"points": known})
            points += [SweepPoint(budget, number, s, **known[key]) for s, key in keys.items()]
    plot_front(points, out / PICTURE)
    return points


def as_json(points: Sequence[SweepPoint]) -> dict[str, Any]:
    """What `--json` prints."""
    from locus.report.pareto_plot import pareto_points

    front = pareto_points([p for p in points if p.control is None])
    return {
        "points": [dataclasses.asdict(p) for p in points],
        "front": [dataclasses.asdict(p) for p in front],
    }
