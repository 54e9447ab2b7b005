"""Forget the fact, not the sentence: edits judged in ways of asking and on subjects that they never saw.

    python -m benchmarks.grid FACTS... -o FOLDER [--draws 0 1 2] [--arms alphaedit late-suppression floor]

FACTS are files with relations and subjects (known_1000, CounterFact). Each draw forgets 14 facts that SmolLM2 answers,
one sentence each, and keeps 35. Every figure is the share of questions still answered, of those that the base answers,
by greedy generation of 8 tokens; intervals resample facts. `floor` is the default edit of other facts: greedy answers
of a small model flip at any change. Finished arms are read back from FOLDER, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.grid_draws import ROWS, Draw, draw
from benchmarks.lib.yardstick import kept_row
from editors import AlphaEdit, LateSuppression
from locus.audit.attacks.generation import generate
from locus.audit.attacks.relearn import relearn
from locus.audit.intervals import Items, mean_interval
from locus.audit.questions import questions_of
from locus.audit.settings import RelearnAttack
from locus.delta import WeightDelta
from locus.elicitation.elicit import elicit
from locus.fact import Example, Fact, neutral_text, read_facts, split_text
from locus.forward import batches, label_logits
from locus.lens import lens_scores
from locus.model import Model, load_model
from locus.target_forms import says
from locus.tokens import encode, encode_text

ARMS: dict[str, type[AlphaEdit] | type[LateSuppression]] = {
    "alphaedit": AlphaEdit,
    "late-suppression": LateSuppression,
    "floor": AlphaEdit,
}
N_NEW = 8
"""Tokens of an answer."""


def written(model: Model, prompts: Sequence[str]) -> list[str]:
    """What the model writes behind each prompt."""
    return generate(model, [encode(model, Example(prompt, " x")).prompt_ids for prompt in prompts], N_NEW)


def edit(model: Model, drawn: Draw, arm: str) -> tuple[WeightDelta, float, float]:
    """One arm's edit, the seconds that asking the model took beforehand, and those of the edit."""
    editor = ARMS[arm]()
    forget, retain = list(drawn.forget), list(drawn.retain)
    if arm == "floor":
        forget, retain = retain[: len(forget)], retain[len(forget) :]
    text, _ = split_text(neutral_text())
    start = time.perf_counter()
    if isinstance(editor, LateSuppression):
        elicit(model, forget, editor.elicitation)
    asked = time.perf_counter() - start
    delta = editor.run(model, forget, retain, editor.own_mask(model), text=text)
    return delta, asked, time.perf_counter() - start - asked


def judged(model: Model, drawn: Draw, arm: str) -> dict[str, Any]:
    """All figures of one arm on one draw."""
    blocks = [block for paragraph in split_text(neutral_text())[1] for block in encode_text(model, paragraph)]
    base = _logprobs(model, blocks)
    delta, asked, seconds = edit(model, drawn, arm)
    found: dict[str, Any] = {"elicitation_s": asked, "edit_s": seconds}
    with delta.applied(model):
        texts = written(model, [one.prompt for one in drawn.asked])
        for row in ROWS:
            mine = [(one, text) for one, text in zip(drawn.asked, texts, strict=True) if one.row == row]
            values = [float(says(text, one.target)) for one, text in mine]
            shown = (
                mean_interval(Items(tuple(one.fact for one, _ in mine), torch.tensor(values)))
                if mine
                else None
            )
            found[row] = None if shown is None else [shown.mean, shown.low, shown.high, len(mine)]
        after = _logprobs(model, blocks)
        found["text_kl"] = float((base.exp() * (base - after)).sum(-1).mean())
        if arm != "floor":
            found |= inside(model, drawn.forget)
    return found


def inside(model: Model, forget: Sequence[Fact]) -> dict[str, float]:
    """What is still in the edited model.

    lens: share of the facts whose answer is in some layer's top 10. back: mean probability of the answers of one half
    of the facts while the other half is taught again, at its highest.
    """
    questions = questions_of(model, [(fact.id, fact) for fact in forget])
    ranks = lens_scores(model, questions.encoded).rank
    curve = relearn(model, questions, RelearnAttack()).tested_prob.mean(1)
    return {"lens": float((ranks < 10).any(1).float().mean()), "back": float(curve.max())}


def _logprobs(model: Model, blocks: Sequence[Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [label_logits(model, batch).log_softmax(-1).cpu() for batch in batches(blocks, 1024)]
        )


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Arms × figures, means over draws; the interval is the widest of the draws'."""
    lines = [
        "| edit | " + " | ".join((*ROWS, "text KL", "lens", "back", "s")) + " |",
        "|---" * (len(ROWS) + 5) + "|",
    ]
    for arm, draws in found.items():
        cells = []
        for row in ROWS:
            values = [one[row] for one in draws if one[row] is not None]
            if not values:
                cells.append("")
                continue
            mean = sum(value[0] for value in values) / len(values)
            cells.append(f"{mean:.2f} [{min(v[1] for v in values):.2f}, {max(v[2] for v in values):.2f}]")
        for name in ("text_kl", "lens", "back", "edit_s"):
            numbers = [one[name] for one in draws if name in one]
            cells.append(f"{sum(numbers) / len(numbers):.3g}" if numbers else "")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the arms that are missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("facts", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args(argv)
    model = load_model(given.model)
    facts = [
        Fact(**{**vars(fact), "id": f"{path.stem}-{fact.id}"[:120]})
        for path in given.facts
        for fact in read_facts(path)
    ]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in given.arms}
    for seed in given.draws:
        drawn = draw(facts, partial(written, model), seed)
        for arm in given.arms:
            path = given.out / f"{arm}-{seed}.json"
            found[arm].append(kept_row(path, partial(judged, model, drawn, arm)))
    print(table(found))


if __name__ == "__main__":
    main()
