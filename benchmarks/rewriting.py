"""Rewriting CounterFact's facts to their new targets with ROME, one at a time.

    python -m benchmarks.rewriting counterfact.json -o FOLDER [--skip 0] [-n 32]

Of the records whose true target the embedded model has right, in the file's order, `--skip` are passed over and `-n`
are edited, each from the base and with ROME's defaults but for the edit target (`--target-to rewrite`). A rewrite
succeeds when the new target is more probable than the true one (CounterFact's efficacy score); "first" counts those
where it is the model's first choice. Paraphrases: the same for the two paraphrase prompts. Neighbours: the share of
neighbourhood prompts the base has right that stay right, and of all of them where the true target stays more
probable than the new one (the neighbourhood score). KL(base || edited) is over neutral text that no edit has read.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.yardstick import Yardstick, kept_row, right
from editors import ROME
from editors.key_value.edit_target import EditTarget
from locus.fact import Example, Fact, neutral_text, read_facts, split_text
from locus.forward import measure
from locus.model import Model, load_model

N_TEXT = 3
"""Unseen paragraphs that the KL is taken over."""
SCORES = (
    "success",
    "first",
    "p_new",
    "paraphrases",
    "paraphrases_first",
    "neighbours",
    "neighbourhood",
    "kl",
)


def known(model: Model, facts: Sequence[Fact], n: int, chunk: int = 64) -> list[str]:
    """Ids of the first `n` facts whose target is the model's first choice."""
    found: list[str] = []
    for start in range(0, len(facts), chunk):
        part = facts[start : start + chunk]
        right = measure(model, part).correct.tolist()
        found += [fact.id for fact, is_right in zip(part, right, strict=True) if is_right]
        if len(found) >= n:
            break
    return found[:n]


def rewrite(base: Yardstick, fact: Fact, retain: Sequence[Fact], text: Sequence[str]) -> dict[str, Any]:
    """Edit one fact from the base and score it."""
    model = base.model
    new = fact.alternatives[0]
    editor = ROME(target=EditTarget(to="rewrite"))
    mask = editor.own_mask(model)
    yardstick = replace(base, forget=[fact], neighbours=right(model, fact.neighbours))
    scores: dict[str, Any] = {}

    def edit() -> Any:
        delta = editor.run(model, [fact], retain, mask, text=text)
        with delta.applied(model):
            prompts = [fact.prompt, *fact.paraphrases, *(one.prompt for one in fact.neighbours)]
            to_new, to_true = (
                measure(model, [Example(prompt, target) for prompt in prompts])
                for target in (new, fact.target)
            )
        wins, first = to_new.nll < to_true.nll, to_new.correct
        some, rest = slice(1, 1 + len(fact.paraphrases)), slice(1 + len(fact.paraphrases), None)
        scores.update(
            success=float(wins[0]),
            first=float(first[0]),
            p_new=float(to_new.prob[0]),
            paraphrases=float(wins[some].float().mean()),
            paraphrases_first=float(first[some].float().mean()),
            neighbourhood=float((~wins[rest]).float().mean()),
        )
        return delta

    row = yardstick.row(mask, edit)
    return {"fact": fact.id, "prompt": fact.prompt, "new": new, **row, **scores}


def main() -> None:
    """Rewrite and print the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("counterfact", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder that keeps finished facts")
    parser.add_argument("--skip", type=int, default=0, help="known facts passed over")
    parser.add_argument("-n", type=int, default=32, help="facts edited")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("smollm2")
    facts = {fact.id: fact for fact in read_facts(args.counterfact)}
    text, unseen = split_text(neutral_text())
    base, retain = Yardstick.of(model, [], [], unseen[:N_TEXT]), read_facts("demo-retain")

    def ask() -> Mapping[str, Any]:
        return {"ids": known(model, list(facts.values()), args.skip + args.n)}

    ids = kept_row(args.out / f"known-{args.skip}-{args.n}.json", ask)["ids"][args.skip :]
    rows = []
    for name in ids:
        fact = facts[name]
        rows.append(kept_row(args.out / f"{name}.json", partial(rewrite, base, fact, retain, text)))
        print(name, *(f"{score} {rows[-1][score]:.3g}" for score in SCORES), flush=True)
    print(f"mean of {len(rows)}:")
    for score in (*SCORES, "seconds"):
        values = [row[score] for row in rows if row[score] == row[score]]  # nan: no neighbour was right
        print(f"  {score:<18}{sum(values) / max(1, len(values)):.4f}")


if __name__ == "__main__":
    main()
