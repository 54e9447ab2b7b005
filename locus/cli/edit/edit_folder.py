"""One edit in a folder of its own: run, or taken as it is where it was finished before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locus.cli.edit.tensorboard import board

if TYPE_CHECKING:
    from locus.delta import WeightDelta
    from locus.fact import Fact
    from locus.mask import WeightMask
    from locus.model import Model
    from locus.parallel.ranks import Ranks

DELTA, ABOUT, HISTORY, STRENGTH_PLOT = "delta.safetensors", "edit.json", "history.jsonl", "strength.png"
INPUTS = "inputs"
"""In edit.json: the digests of what the edit was made from."""
BATCH_TOKENS = 1024
"""Of the last question, whether it worked: less than any edit itself needs."""


def edit_into(
    folder: Path,
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    text: Sequence[str],
    mask: WeightMask,
    method: str,
    editor: Any,
    resume: bool,
    tensorboard: bool = False,
    ranks: Ranks | None = None,
) -> WeightDelta:
    """Run one edit and write its three files; a finished one of the same inputs is taken as it is on resume.

    Several processes run it together, and the first of them writes. With `tensorboard` its history is written as
    scalars besides, while it runs.

    Raises:
        InputError: the folder holds a finished edit, and it is not to be resumed or was made from other inputs.
    """
    from locus.delta import WeightDelta
    from locus.errors import InputError
    from locus.fact import trainable_facts
    from locus.files.artefact import load_json
    from locus.input_digest import input_digests, refuse_changed

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "method": method,
        "settings": _plain(dataclasses.asdict(editor)),
        "mask": {
            "weights": mask.n_weights,
            "provenance": _plain(dict(mask.provenance)),
            "digest": mask.digest,
        },
        "forget": [f.id for f in forget],
        "retain": [f.id for f in trainable_facts(retain)],
        INPUTS: input_digests(
            model,
            facts={"forget facts": forget, "retain facts": trainable_facts(retain)},
            settings=editor,
            text=list(text),
            mask=mask.digest,
            method=method,
        ),
    }
    if model.chat:
        about["chat"] = True
    if ranks is not None:
        ranks.agree(
            "files in the output folder (it must be one that all see)", str((folder / ABOUT).exists())
        )
    if (folder / ABOUT).exists():
        earlier = load_json(folder / ABOUT, "edit")
        if not resume:
            raise InputError(f"{folder} holds a finished edit: give another folder, or --resume to keep it")
        refuse_changed(f"{folder} holds an edit", earlier.get(INPUTS), about[INPUTS])
        return WeightDelta.load(folder / DELTA)
    history: list[Mapping[str, Any]] = []
    first = ranks is None or ranks.first
    together = {} if ranks is None or ranks.size == 1 else {"ranks": ranks}
    with board(folder) if tensorboard and first else contextlib.nullcontext() as shown:

        def log(record: Mapping[str, Any]) -> None:
            history.append(record)
            if shown is not None:
                shown(record)

        delta: WeightDelta = editor.run(
            model,
            forget,
            retain,
            mask,
            text=text,
            folder=folder / ".resume",
            resume=resume,
            log=log,
            **together,
        )
    if first:
        delta.save(folder / DELTA)
        answers = None if together else answers_of(model, forget, delta)
        _write(folder, delta, history, {**about, "answers": answers})
    return delta


def answers_of(model: Model, forget: Sequence[Fact], delta: WeightDelta) -> dict[str, Any] | None:
    """What the model gives to the targets before and after; None where its weights are not all in memory.

    `prob` is the mean probability of a whole target, `prob_token` that of a token (exp(-NLL / tokens), averaged over
    the facts), `right` the facts whose every token is the first choice.
    """
    from locus.forward import TargetScores, measure

    if any(parameter.is_meta for parameter in model.module.parameters()):
        return None

    def told(scores: TargetScores) -> dict[str, Any]:
        return {
            "prob": float(scores.prob.mean()),
            "prob_token": float((-scores.nll / scores.n_tokens).exp().mean()),
            "right": int(scores.correct.sum()),
        }

    before = measure(model, forget, BATCH_TOKENS)
    with delta.applied(model):
        after = measure(model, forget, BATCH_TOKENS)
    tokens = float(before.n_tokens.float().mean())
    return {"facts": len(forget), "tokens": tokens, "before": told(before), "after": told(after)}


def _write(
    folder: Path,
    delta: WeightDelta,
    history: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> None:
    """What stands beside a finished edit's delta; what could be resumed is no longer needed."""
    from locus.files.artefact import atomic_file, save_json

    with atomic_file(folder / HISTORY) as path:
        path.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in history), "utf-8")
    save_json(
        folder / ABOUT,
        "edit",
        {
            **about,
            "outcome": _plain(dict(delta.provenance)),
            "changed": delta.n_changed,
            "rounding": delta.rounding.to_json(),
        },
    )
    if points := delta.provenance.get("strength_curve"):
        from locus.report import plot_strength

        plot_strength(points, delta.provenance["strength"], folder / STRENGTH_PLOT)
    _clear(folder / ".resume")


def _clear(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _plain(value: Any) -> Any:
    """JSON's own types: tuples as lists, paths as text."""
    return json.loads(json.dumps(value, default=str))
