"""`locus run`: the whole walk from one TOML file, resumable stage by stage.

A stage is a command: its table holds that command's options, its method's among them, and `locus run` adds the
model, the facts and the paths. So a stage offers what its command offers, and nothing is defined twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import CycloptsError, Parameter

from locus.cli.options import Loading, Running, Talking, option_names, tokens_of
from locus.cli.renamed_options import RENAMED_OPTIONS, current_options
from locus.errors import InputError
from locus.fact import did_you_mean
from locus.files.toml import read_toml

if TYPE_CHECKING:
    from locus.model import Model

N_ASKED = 3
"""Prompts that the edited model continues at the end of a run."""
STAGES = ("trace", "locate", "edit", "export", "audit")
_NEEDS: Mapping[str, tuple[str, ...]] = {"export": ("edit",), "audit": ("edit",)}
"""Stages that work on what another has made."""
_FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "edit": ("locate",),
    "export": ("edit",),
    "audit": ("locate", "edit"),
}
"""Stages whose artefacts a stage reads where they are there."""
_MADE: Mapping[str, tuple[str, ...]] = {
    "trace": ("trace",),
    "locate": ("mask.safetensors", "scores.safetensors"),
    "edit": ("edit",),
    "export": ("checkpoint",),
    "audit": ("audit",),
}
"""What a stage writes, in the folder of the run."""
_DECIDED: Mapping[str, frozenset[str]] = {
    "": frozenset({"model", "base", "edited", "tokens", "loading", "running", "talking", "out", "resume"}),
    "locate": frozenset({"facts", "scores", "repetitions", "patience"}),
    "edit": frozenset({"facts", "estimate_memory", "sweeping", "shard", "offload"}),
    "trace": frozenset({"facts"}),
    "export": frozenset({"delta", "adapter"}),
}
"""Parameters of the commands that are not options of a stage: `locus run` gives them, or they end in something else."""


def run(
    config: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    resume: Annotated[bool, Parameter(negative="")] = False,
    talking: Talking = Talking(),
) -> int:
    """Run trace, locate, edit, export and audit as one TOML file says.

    [model] has the name and how it is loaded (dtype, chat, trust_remote_code ...), [facts] the files forget, retain and
    text. Each of [trace], [locate], [edit], [export] and [audit] takes the options of the command of that name and of
    its method; a table that is missing leaves its stage out. [run] has limit, seed and batch_tokens for all of them.
    demo.toml is an example. Exit 3 if [audit] has a gate that is not met.

    Args:
        config: The TOML file.
        out: Folder for the artefacts of all stages.
        resume: Take up finished stages whose inputs are the same; make the others anew.
    """
    from locus.files.artefact import lock

    walk = Walk.read(config, out, talking)
    if (out / "run.json").exists() and not resume:
        raise InputError(f"{out} holds an earlier run: give another folder, or --resume to go on with it")
    with lock(out):
        with talking.progress():
            code = walk.go()
        talking.finish(walk.result, "" if talking.quiet or talking.json else walk.summary())
    return code


@dataclass(frozen=True)
class _LoadedOnce(Loading):
    """Loading that gives the stages of a run one model."""

    kept: dict[str, Model] = field(default_factory=dict)
    """Name of the base -> the model, once it is loaded."""
    base: str = ""

    def load(self, name: str, *, shard: bool = False, offload: bool = False) -> Model:
        if name != self.base:
            return super().load(name, shard=shard, offload=offload)
        if name not in self.kept:
            self.kept[name] = super().load(name, shard=shard, offload=offload)
        return self.kept[name]


@dataclass(frozen=True)
class _Heard(Talking):
    """What a stage ends with is kept, not printed."""

    results: list[dict[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Nothing: the run shows progress."""
        yield

    def note(self, text: str) -> None:
        """Indented under the stage."""
        super().note(f"    {text}")

    def finish(self, result: dict[str, Any], summary: str | Any) -> None:
        """Keep it."""
        self.results.append(result)


@dataclass(frozen=True)
class Stage:
    """One command of the run, with everything it is given."""

    name: str
    command: Callable[..., Any]
    bound: inspect.BoundArguments
    """As the command line would give them."""

    @property
    def running(self) -> Running:
        """How much is done."""
        given: Running = self.bound.arguments.get("running", Running())
        return given

    def check(self) -> None:
        """Refuse an unknown method, option or value before anything long starts."""
        from editors import EDITORS
        from locus.cli.audit import audit_settings
        from locus.cli.edit.command import edit_method
        from locus.cli.options import method_class, method_settings
        from tracing import LOCALIZERS, CausalTrace

        given, tokens, shared = (
            self.bound.arguments,
            self.bound.arguments.get("tokens", ()),
            self.running.shared,
        )
        if self.name == "trace":
            method_settings("locus trace", CausalTrace, tokens, shared)
        elif self.name == "locate":
            method = given.get("method", inspect.signature(self.command).parameters["method"].default)
            if any(mark in method for mark in ",:") or method == "all":
                raise InputError("one method writes the mask that is edited; `locus locate` compares several")
            method_settings("locus locate", method_class(LOCALIZERS, method, "localizer"), tokens, shared)
        elif self.name == "edit":
            method = edit_method(given.get("method"), given.get("mask") is not None)
            method_settings("locus edit", method_class(EDITORS, method, "editor"), tokens, shared)
        elif self.name == "audit":
            audit_settings(tokens, given.get("attacks", ()), self.running)

    def run(self, loading: _LoadedOnce, talking: Talking) -> tuple[dict[str, Any], int]:
        """Run the command; gives what it ended with, and its exit code."""
        given = dict(self.bound.arguments)
        heard = _Heard(quiet=talking.quiet, debug=talking.debug)
        parameters = inspect.signature(self.command).parameters
        given["talking"] = heard
        if "loading" in parameters:
            given["loading"] = loading
        first = [given.pop(n) for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
        tokens = given.pop("tokens", ())
        code = self.command(*first, *tokens, **given)
        return heard.results[-1], code if isinstance(code, int) else 0


@dataclass
class Walk:
    """One run of the stages: its configuration, its folder, and what it came to."""

    config: Mapping[str, Any]
    where: str
    out: Path
    talking: Talking
    stages: dict[str, Stage] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, out: Path, talking: Talking) -> Walk:
        """Read and check the configuration; nothing is loaded or written yet.

        Raises:
            InputError: an unknown table, option, method or value, or a stage without what it works on.
        """
        config = read_toml(path, "demo.toml is an example")
        allowed = {
            "model": ["name", *(f.name for f in dataclasses.fields(Loading))],
            "facts": ["forget", "retain", "text"],
            "run": [f.name for f in dataclasses.fields(Running) if f.name != "resume"],
        }
        for table, given in config.items():
            if table not in (*allowed, *STAGES):
                raise InputError(f"{path}: unknown table {did_you_mean(table, (*allowed, *STAGES))}")
            if not isinstance(given, dict):
                raise InputError(f"{path}: {table} must be a table: [{table}]")
            for name in given if table in allowed else ():
                if name not in allowed[table]:
                    raise InputError(f"{path} [{table}]: unknown option {did_you_mean(name, allowed[table])}")
        for table, needed in (("model", "name"), ("facts", "forget")):
            if not isinstance(config.get(table, {}).get(needed), str):
                raise InputError(f"{path}: [{table}] must say {needed} = ...")
        for stage, needs in _NEEDS.items():
            for other in needs:
                if stage in config and other not in config:
                    raise InputError(f"{path}: [{stage}] needs [{other}] before it")
        walk = cls(config, str(path), out, talking)
        for stage in STAGES:
            if stage in config:
                walk.stages[stage] = walk.stage(stage)
        return walk

    def stage(self, name: str) -> Stage:
        """The command of a stage with its options, checked."""
        from locus.cli.app import app

        where, table = f"{self.where} [{name}]", dict(self.config[name])
        own = _own_options(name)
        for option in table:
            known = [*own, *_method_options(name, self.method(name))]
            if (
                option.replace("-", "_") not in known
                and f"--{option.replace('_', '-')}" not in RENAMED_OPTIONS
            ):
                raise InputError(f"{where}: unknown option {did_you_mean(option, known)}")
        facts = str(table.pop("facts", self.config["facts"]["forget"]))
        tokens = [
            name, *self._positional(name, facts), "--out", str(self.out / _MADE[name][0]),
            *tokens_of({**self._given(name), **table}, flags=own),
        ]  # fmt: skip
        try:
            command, bound, _ = app.parse_args(
                current_options(tokens), exit_on_error=False, print_error=False
            )
            stage = Stage(name, command, bound)
            stage.check()
        except (CycloptsError, InputError) as error:
            raise InputError(f"{where}: {error}") from error
        return stage

    def method(self, stage: str) -> str:
        """The method that a stage names, or the one it has without a name."""
        from locus.cli.edit.command import edit_method

        default = edit_method(None, "locate" in self.config) if stage == "edit" else "saliency"
        return str(self.config.get(stage, {}).get("method", default))

    def _positional(self, stage: str, facts: str) -> list[str]:
        model = self.config["model"]["name"]
        return {"export": [model], "audit": [model, str(self.out / "edit"), facts]}.get(stage, [model, facts])

    def _given(self, stage: str) -> dict[str, Any]:
        """The options that a stage is given beside those of its table."""
        given: dict[str, Any] = {}
        if stage != "export":
            given |= {k: v for k, v in self.config["model"].items() if k != "name"}
            given |= self.config.get("run", {})
        if stage != "locate":  # which is made anew, or not at all
            given["resume"] = True
        retain, text = (self.config["facts"].get(name) for name in ("retain", "text"))
        if retain is not None and stage in ("locate", "edit", "audit"):
            given["retain"] = retain
        if text is not None and stage in ("edit", "audit"):
            given["text"] = text
        if "locate" in self.config and stage in ("edit", "audit"):
            given["mask"] = str(self.out / "mask.safetensors")
        if stage == "locate":
            given["scores"] = str(self.out / "scores.safetensors")
        if stage == "export":
            given["delta"] = str(self.out / "edit" / "delta.safetensors")
        return given

    def go(self) -> int:
        """Run every stage that is not already done with the same inputs; gives the exit code."""
        from locus.files.artefact import load_json, save_json
        from locus.input_digest import differing, digest_of

        path, code = self.out / "run.json", 0
        done = dict(load_json(path, "run")["stages"]) if path.exists() else {}
        loading = self.loading
        inputs: dict[str, Any] = {}
        for number, (name, stage) in enumerate(self.stages.items(), 1):
            inputs[name] = self._inputs(stage) | {
                f"[{other}]": digest_of(inputs[other]) for other in _FOLLOWS.get(name, ()) if other in inputs
            }
            before = done.get(name, {})
            changed = differing(before.get("inputs", {}), inputs[name])
            if "result" in before and not changed:
                self.result[name], code = before["result"], before.get("code", 0)
                self.talking.note(f"[{number}] {name}: done before")
                continue
            self.talking.note(f"[{number}] {name}")
            if before and changed:
                self.talking.note(f"    made anew; what changed: {', '.join(changed[:4])}")
                self._discard(name)
            done[name] = {"inputs": inputs[name]}
            save_json(path, "run", {"stages": done})
            result, code = stage.run(loading, self.talking)
            self.result[name] = {**self._paths(name), **result}
            done[name] |= {"result": self.result[name], "code": code}
            save_json(path, "run", {"stages": done})
        return code

    def _paths(self, stage: str) -> dict[str, str]:
        """Where a stage's result is, for those whose command does not say."""
        if stage == "edit":
            return {"delta": str(self.out / "edit" / "delta.safetensors")}
        return {"checkpoint": str(self.out / "checkpoint")} if stage == "export" else {}

    @cached_property
    def loading(self) -> _LoadedOnce:
        """How the stages load the model: once."""
        loading = next(
            (s.bound.arguments["loading"] for s in self.stages.values() if "loading" in s.bound.arguments),
            Loading(),
        )
        return _LoadedOnce(**dataclasses.asdict(loading), base=self.config["model"]["name"])

    @cached_property
    def shape(self) -> Model:
        """The model without its weights, which says what they are and how they are read."""
        return self.loading.shape(self.config["model"]["name"])

    def _inputs(self, stage: Stage) -> dict[str, Any]:
        """Digests of everything a stage depends on, but for the stages before it."""
        from locus.cli.edit.edit_data import GENERATED, NEIGHBOURS
        from locus.fact import neutral_text, read_facts
        from locus.input_digest import input_digests

        given, table = stage.bound.arguments, self.config[stage.name]
        facts: dict[str, Any] = {}
        others: dict[str, Any] = {}
        if table.get("suite", "facts") == "facts":
            facts["facts"] = stage.running.facts(str(table.get("facts", self.config["facts"]["forget"])))
        retain = given.get("retain")
        if retain is not None and (retain != NEIGHBOURS or Path(retain).exists()):
            facts["retain facts"] = read_facts(retain)
        if stage.name in ("edit", "audit"):
            text = given.get("text")
            generated = text == Path(GENERATED) and not text.exists()
            others["text"] = GENERATED if generated else neutral_text(text)
        options = {**self.config.get("run", {}), **table}
        others["files"] = {name: _content(value) for name, value in options.items()}
        return input_digests(self.shape, facts=facts, settings=options, **others)

    def summary(self) -> Any:
        """The table a newcomer reads at the end."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = []
        if "audit" in self.result:
            from locus.audit import read_audit
            from locus.report import terminal_table

            parts.append(terminal_table(read_audit(self.out / "audit")))
        lines = {
            "trace": ("where the facts live", "report"),
            "locate": ("the located weights", "mask"),
            "edit": ("the change", "delta"),
            "export": ("the edited checkpoint", "checkpoint"),
            "audit": ("the evidence", "report"),
        }
        for stage, (what, key) in lines.items():
            if stage in self.result:
                parts.append(Text(f"{what:<24}{self.result[stage][key]}"))
        if "edit" in self.result:
            parts += map(Text, self._asked())
        return Group(*parts)

    def _asked(self) -> list[str]:
        """What the base and the edited model write after a few forget prompts, and how to ask more."""
        from locus.cli.ask import answer_lines, greedy_answers
        from locus.cli.edit.command import ask_command
        from locus.delta import WeightDelta

        model = self.config["model"]["name"]
        prompts = [fact.prompt for fact in Running(limit=N_ASKED).facts(self.config["facts"]["forget"])]
        lines = [f"{'ask it':<24}{ask_command(model, self.out / 'edit', prompts[0])}"]
        if (base := self.loading.kept.get(model)) is None:  # nothing was run this time
            return lines
        delta = WeightDelta.load(self.out / "edit" / "delta.safetensors")
        rows = greedy_answers(base, {"base": base, "edited": delta}, prompts, tokens=16)
        return [*lines, answer_lines(rows)]

    def _discard(self, stage: str) -> None:
        """Remove a stage's artefacts that were made from other inputs."""
        for name in _MADE[stage]:
            path = self.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _own_options(stage: str) -> list[str]:
    """The options of the command itself that a stage may have."""
    from locus.cli.app import app

    command = app[stage].default_command
    assert command is not None
    parameters = inspect.signature(command).parameters
    own = [name for name in parameters if name not in _DECIDED[""] | _DECIDED.get(stage, frozenset())]
    if "running" in parameters:
        own += [f.name for f in dataclasses.fields(Running) if f.name != "resume"]
    return own


def _method_options(stage: str, method: str) -> Sequence[str]:
    """The options of the stage's method; none where there is no such method, which is refused later."""
    from editors import EDITORS
    from locus.audit import AuditSettings
    from tracing import LOCALIZERS, CausalTrace

    cls: type[Any] | None = {
        "trace": CausalTrace,
        "audit": AuditSettings,
        "locate": LOCALIZERS.get(method),
        "edit": EDITORS.get(method),
    }.get(stage)
    return [] if cls is None else [name for name in option_names(cls) if name != "max_tokens"]


def _content(value: Any) -> Any:
    """The content of a file or folder that an option names; None where it names none."""
    if isinstance(value, list):
        return [_content(one) for one in value]
    path = Path(value) if isinstance(value, str) and 0 < len(value) < 4096 and "\0" not in value else None
    try:
        if path is None or not path.exists():
            return None
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()
