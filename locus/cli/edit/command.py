"""`locus edit`: make the model forget, changing only the masked weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from locus.cli.edit.controls import Edited, Wanted, make_controls
from locus.cli.edit.edit_data import GENERATED, material
from locus.cli.edit.edit_folder import ABOUT, DELTA, edit_into
from locus.cli.edit.memory_estimate import print_estimate
from locus.cli.edit.sweep import Sweeping, as_json, sweep_into
from locus.cli.edit.tensorboard import check_board
from locus.cli.options import Loading, MethodTokens, Running, Talking, method_class, method_settings

if TYPE_CHECKING:
    from locus.delta import WeightDelta
    from locus.mask import WeightMask
    from locus.model import Model

MASK = "mask.safetensors"
WORTH_SAYING = 0.05
"""Share of an edit's norm that rounding may change without a word."""
_WHERE = Group("Where it may change", sort_key=2)
_KEEP = Group("What must stay", sort_key=3)
_CONTROLS = Group("Controls for the audit", sort_key=4)
_LARGE = Group("Large models", sort_key=5)
WITH_MASK, WITHOUT_MASK = "npo", "alphaedit"
"""The editor where none is named (benchmarks/README.md, "Fresh facts")."""


def edit(
    model: str,
    facts: str,
    /,
    *tokens: MethodTokens,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    method: str | None = None,
    target_new: str | None = None,
    tensorboard: Annotated[bool, Parameter(negative="")] = False,
    mask: Annotated[Path | None, Parameter(group=_WHERE)] = None,
    widen: Annotated[bool, Parameter(negative="", group=_WHERE)] = False,
    retain: Annotated[str | None, Parameter(group=_KEEP)] = None,
    text: Annotated[Path | None, Parameter(group=_KEEP)] = None,
    controls: Annotated[int, Parameter(group=_CONTROLS)] = 0,
    control_profile: Annotated[Literal["layers", "uniform"], Parameter(group=_CONTROLS)] = "layers",
    estimate_memory: Annotated[bool, Parameter(negative="", group=_LARGE)] = False,
    shard: Annotated[bool, Parameter(negative="", group=_LARGE)] = False,
    offload: Annotated[bool, Parameter(negative="", group=_LARGE)] = False,
    sweeping: Sweeping = Sweeping(),
    loading: Loading = Loading(),
    running: Running = Running(),
    talking: Talking = Talking(),
) -> None:
    """Make the model forget facts by changing few of its weights; writes the change, a delta.

    With --mask the weights of the mask are trained (npo). Without it, and if every fact names its subject, AlphaEdit
    replaces each answer in closed form: it chooses the weights, and writes its mask beside the delta. --method names
    another editor. Every editor has options of its own, given like those below: `locus methods` lists the editors,
    `locus methods NAME` the options of one. Under torchrun, processes share every step of a trained edit.

    Args:
        model: The base: checkpoint folder, hub id, or smollm2.
        facts: What must go: a fact file, or demo-forget.
        out: Folder for delta.safetensors, edit.json and history.jsonl, and strength.png where a strength was
            searched for.
        mask: The mask that `locus locate` wrote: nothing else may change. Without it rome, memit, alphaedit and law
            choose down projections, and the edits of neurons take those listed as `--neurons layer:neuron`.
        widen: Let the whole down projections of the mask's layers change, not its neurons alone.
        target_new: The answer that rome, memit and alphaedit write instead, for every fact. Without it
            `--target-to rewrite` takes each fact's own (CounterFact's target_new, or the first alternative).
        method: The editor, with its own options: `locus methods NAME` shows them. The default is npo with a mask,
            alphaedit without one.
        retain: What must stay: a fact file, demo-retain, or `neighbours` for the neighbours that the facts list.
            Facts marked held_out are never trained on, nor is every third neighbour: the audit judges by them.
        text: Neutral paragraphs for the retain term: a text file, or `generated` for text that the model writes
            itself, kept beside the delta. The default is a text that comes with locus. The audit reads every third.
        controls: Also make this many controls for the audit: the same edit with random masks of equal size and kind; of
            an edit that chooses its layers, in other layers. A verdict on whether the place mattered takes 5.
        control_profile: layers: a control has as many weights in each layer as the mask; uniform: over all layers.
        estimate_memory: Print the peak memory of the edit, from the config, the mask and the facts, and stop. No
            weights are read, so it also runs on a machine too small for the model.
        tensorboard: Also write the history as TensorBoard scalars (pip install "locus-unlearn[tensorboard]").
        shard: Spread the model over the processes that torchrun started, each of which holds a part (FSDP2): for
            models that no device holds whole. Without it each holds all of it, and takes part of every step's examples.
        offload: With --shard, keep the parts in main memory.
    """
    from locus.errors import InputError
    from locus.mask import WeightMask
    from locus.parallel.ranks import joined
    from locus.report.pareto_plot import front_table
    from locus.scores import NeuronScores

    with joined() as ranks:
        talking = talking.of(ranks)
        method = edit_method(method, mask is not None or sweeping.sweep is not None or estimate_memory)
        editor = _editor(method, tokens, running, target_new)
        if ranks.size > 1:
            _refuse_alone(method, sweeping, text, estimate_memory)
        if mask is not None and sweeping.sweep is not None:
            raise InputError("locus edit: give --mask for one edit, or --sweep with neuron scores for many")
        if tensorboard:
            check_board()
        given = None if mask is None else WeightMask.load(mask)
        if estimate_memory:
            print_estimate(loading.shape(model), method, editor, given, running, facts, retain, text, talking)
            return
        if out is None:
            raise InputError("locus edit: say where to write with -o FOLDER")
        scores = None if sweeping.sweep is None else NeuronScores.load(sweeping.sweep)
        loaded = loading.load(model, shard=shard, offload=offload)
        with ranks.hold(out), talking.progress():
            asked = material(loaded, running.facts(facts), retain, text, out, running.seed)
            if scores is not None:
                points = sweep_into(
                    out, loaded, asked, scores, (method, editor), Wanted(controls, control_profile),
                    sweeping, running.resume, talking.note,
                )  # fmt: skip
                talking.finish(as_json(points), front_table(points))
                return
            forget, kept, (neutral, _) = asked
            located = mask_for(loaded, editor, method, given, widen)
            made = partial(
                edit_into, model=loaded, forget=forget, retain=kept, text=neutral, method=method,
                resume=running.resume, tensorboard=tensorboard, ranks=ranks,
            )  # fmt: skip
            delta = made(out, mask=located, editor=editor)
            if located is not given and ranks.first:
                located.save(out / MASK)
            edited, wanted = Edited(loaded, editor, located, delta), Wanted(controls, control_profile)
            _, why = make_controls(out, edited, wanted, made, write=ranks.first)
            if why:
                talking.note(f"controls: {why}")
        if ranks.first:
            about = json.loads((out / ABOUT).read_text("utf-8"))
            lines = [
                f"{out / DELTA}: {summary(about, delta)}",
                f"ask it: {ask_command(model, out, forget[0].prompt)}",
            ]
            talking.finish(about, _told(about, "\n".join(lines)))


def ask_command(model: str, edited: Path, prompt: str) -> str:
    """The command that lets the edited model continue a prompt."""
    return f"locus ask {shlex.quote(model)} --edited {shlex.quote(str(edited))} {shlex.quote(prompt)}"


def edit_method(method: str | None, with_mask: bool) -> str:
    """The editor named, or the one that is taken with a mask or without."""
    return method or (WITH_MASK if with_mask else WITHOUT_MASK)


def _editor(method: str, tokens: Sequence[str], running: Running, target_new: str | None) -> Any:
    """The method with its own options, and with a rewrite for its edit target where an answer is given."""
    from editors import EDITORS

    command = f"locus edit --method {method}"
    editor: Any = method_settings(command, method_class(EDITORS, method, "editor"), tokens, running.shared)
    return editor if target_new is None else rewriting(editor, method, target_new)


def _refuse_alone(method: str, sweeping: Sweeping, text: Path | None, estimate_memory: bool) -> None:
    """Several processes make the steps of a training together; nothing else is shared."""
    from editors import OBJECTIVES
    from locus.errors import InputError

    asked = {
        "--sweep": sweeping.sweep is not None,
        "--estimate-memory": estimate_memory,
        "--text generated": text == Path(GENERATED),
        f"--method {method}": method not in OBJECTIVES,
    }
    for what, alone in asked.items():
        if alone:
            raise InputError(f"locus edit {what} runs in one process: start it without torchrun")


def rewriting(editor: Any, method: str, answer: str) -> Any:
    """The editor with a rewrite to this answer for its edit target.

    Raises:
        InputError: it is none that can rewrite.
    """
    from editors.editor import Rewrites
    from locus.errors import InputError

    if not isinstance(editor, Rewrites):
        raise InputError(f"--target-new: {method} cannot rewrite: use rome, memit or alphaedit")
    return editor.rewriting_to(answer)


def mask_for(
    model: Model, editor: Any, method: str, given: WeightMask | None, widen: bool = False
) -> WeightMask:
    """The weights that an edit may change: the mask given, that one widened, or the method's own choice.

    Raises:
        InputError: none is given and the method has none of its own.
    """
    from editors.editor import ChoosesMask
    from editors.key_value.down_projections import layers_of
    from locus.errors import InputError

    if given is None and isinstance(editor, ChoosesMask):
        return editor.own_mask(model)
    if given is None:
        raise InputError(f"locus edit --method {method} needs --mask: `locus locate` makes one")
    return layers_of(model, given) if widen else given


def summary(about: Mapping[str, Any], delta: WeightDelta) -> str:
    """One line on how an edit ended, and what is wrong with it."""
    outcome = about.get("outcome", {})
    said = [f"{delta.n_changed:,} weights changed", *_answers(about.get("answers"))]
    if "reached" in outcome:
        missed = "" if outcome["reached"] else ", the goal not reached"
        said.append(f"strength {outcome['strength']:.3g}{missed}")
    if outcome.get("stopped"):
        said.append(f"stopped: {outcome['stopped']}")
    if (lost := delta.rounding.relative_norm_lost) >= WORTH_SAYING:
        said.append(
            f"rounding to the checkpoint's dtype changed the edit by {lost:.0%} of its norm (--rounding)"
        )
    if over := outcome.get("over_forgotten"):
        said.append(f"over-forgotten, less probable than chance: {len(over)} ({', '.join(over[:3])})")
    return "; ".join(said)


SENTENCE_TOKENS = 8
"""Targets of more tokens on average are judged by the token: a sentence is improbable as a whole, known or not."""


def _answers(asked: Mapping[str, Any] | None) -> list[str]:
    """The targets before and after, in words."""
    from locus.audit.verdicts.verdict import in_percent

    if asked is None:
        return []
    whole = asked["tokens"] <= SENTENCE_TOKENS
    which, what = ("prob", "p(target)") if whole else ("prob_token", "p of a target's token")
    before, after = asked["before"], asked["after"]
    return [
        f"{what} {in_percent(before[which])} → {in_percent(after[which])}, "
        f"right {before['right']} → {after['right']} of {asked['facts']}"
    ]


def _told(about: Mapping[str, Any], line: str) -> Any:
    """The summary, under the strength curve where there is one."""
    outcome = about.get("outcome", {})
    points = outcome.get("strength_curve") or outcome.get("dose")  # "dose": written by the release before
    if not points:
        return line
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("strength", "p(target)", "first choice", "retain right", "KL (nats)"):
        table.add_column(title, justify="right")
    for point in points:
        rest = (point["retain_right"], point["kl"])
        table.add_row(
            f"{point['strength']:.3g}",
            f"{point['forget_prob']:.4f}",
            f"{point['forget_right']:.0%}",
            "" if rest[0] is None else f"{rest[0]:.0%}",
            "" if rest[1] is None else f"{rest[1]:.4f}",
        )
    return Group(table, line)
