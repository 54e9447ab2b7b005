"""`locus run`: the whole walk from one TOML file, resumable stage by stage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from locus.cli.options import Loading, Running, Talking, method_class, settings_from
from locus.errors import InputError
from locus.files.toml import read_toml

if TYPE_CHECKING:
    from locus.fact import Fact
    from locus.model import Model

STAGES = ("trace", "locate", "edit", "export", "audit")
_TABLES = {
    "model": {"name", "device", "dtype", "device_map", "attn", "bos"},
    "facts": {"forget", "retain", "text"},
    "export": {"link"},
    "audit": None,
    "trace": None,
    "locate": None,
    "edit": None,
}


def run(
    config: Path,
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    resume: Annotated[bool, Parameter(negative="")] = False,
    talking: Talking = Talking(),
) -> None:
    """Run trace, locate, edit, export and audit as one TOML file says.

    A table that is missing from the file leaves its stage out. demo.toml is an example of all of them.

    Args:
        config: The TOML file.
        out: Folder for the artefacts of all stages.
        resume: Take finished stages as they are, as long as nothing they depend on has changed.
    """
    from locus.files.artefact import lock

    walk = Walk.read(config, out, talking)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "run.json").exists() and not resume:
        raise InputError(f"{out} holds an earlier run: give another folder, or --resume to go on with it")
    with lock(out):
        with talking.progress():
            walk.go()
        talking.finish(walk.result, walk.summary())


@dataclass
class Walk:
    """One run of the stages: its configuration, its folder, and what has been loaded so far."""

    config: Mapping[str, Any]
    where: str
    out: Path
    talking: Talking
    result: dict[str, Any] = field(default_factory=dict)
    _model: Model | None = None

    @classmethod
    def read(cls, path: Path, out: Path, talking: Talking) -> Walk:
        """Read and check the configuration; nothing is loaded or written yet."""
        config = read_toml(path, "demo.toml is an example")
        for table, given in config.items():
            if table not in _TABLES:
                raise InputError(
                    f"{path}: unknown table [{table}]; there are {', '.join(f'[{t}]' for t in _TABLES)}"
                )
            if not isinstance(given, dict):
                raise InputError(f"{path}: {table} must be a table: [{table}]")
            allowed = _TABLES[table]
            unknown = sorted(set(given) - allowed) if allowed is not None else []
            if unknown:
                raise InputError(
                    f"{path} [{table}]: unknown option {unknown[0]}; there are {', '.join(sorted(allowed or ()))}"
                )
        for table, needed in (("model", "name"), ("facts", "forget")):
            if needed not in config.get(table, {}):
                raise InputError(f"{path}: [{table}] must say {needed} = ...")
        walk = cls(config, str(path), out, talking)
        walk.check()
        return walk

    def check(self) -> None:
        """Refuse a wrong method or option before anything long starts."""
        for stage, needs in (("edit", "locate"), ("export", "edit"), ("audit", "edit")):
            if stage in self.config and needs not in self.config:
                raise InputError(f"{self.where}: [{stage}] needs [{needs}] before it")
        for stage in ("trace", "locate", "edit", "audit"):
            if stage in self.config:
                self.method(stage)

    def method(self, stage: str) -> tuple[str, Any]:
        """The method of a stage, by name and as made from its table."""
        from editors import EDITORS
        from tracing import LOCALIZERS, CausalTrace

        if stage == "audit":
            from locus.cli.audit import settings_of_table

            return "audit", settings_of_table(f"{self.where} [audit]", self.config["audit"])
        table = dict(self.config[stage])
        for own in _OWN[stage]:
            table.pop(own, None)
        if stage == "trace":
            return "causal-trace", settings_from(f"{self.where} [trace]", CausalTrace, table)
        name, methods, kind = {
            "locate": ("saliency", LOCALIZERS, "localizer"),
            "edit": ("npo", EDITORS, "editor"),
        }[stage]
        name = str(self.config[stage].get("method", name))
        return name, settings_from(f"{self.where} [{stage}]", method_class(methods, name, kind), table)

    def go(self) -> None:
        """Run every stage of the configuration that is not already done."""
        from locus.files.artefact import save_json

        done = self._done()
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "trace": self.trace,
            "locate": self.locate,
            "edit": self.edit,
            "export": self.export,
            "audit": self.audit,
        }
        chain = [json.dumps(self.config[t], sort_keys=True) for t in ("model", "facts")]
        chain.append(_digest(*(f.id + f.prompt + f.target for f in [*self.forget, *self.retain])))
        for number, stage in enumerate((s for s in STAGES if s in self.config), 1):
            if stage != "trace":
                chain.append(stage + json.dumps(self.config[stage], sort_keys=True))
            key = _digest(*chain, stage, json.dumps(self.config[stage], sort_keys=True))
            before = done.get(stage, {})
            if before.get("key") == key:
                self.result[stage] = before["result"]
                self.talking.note(f"[{number}] {stage}: done before")
                continue
            self.talking.note(f"[{number}] {stage}")
            if before:
                self._discard(stage)
            self.result[stage] = steps[stage]()
            done[stage] = {"key": key, "result": self.result[stage]}
            save_json(self.out / "run.json", "run", {"stages": done})

    @property
    def model(self) -> Model:
        """The base model, loaded when it is first needed."""
        if self._model is None:
            given = {k: v for k, v in self.config["model"].items() if k != "name"}
            self._model = Loading(**given).load(self.config["model"]["name"])
        return self._model

    @property
    def forget(self) -> list[Fact]:
        """The facts that must go."""
        return Running().facts(self.config["facts"]["forget"])

    @property
    def retain(self) -> list[Fact]:
        """The facts that must stay, those held out for judging among them."""
        path = self.config["facts"].get("retain")
        return [] if path is None else Running().facts(path)

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """Neutral paragraphs to train on, and those that judge."""
        from locus.fact import neutral_text, split_text

        path = self.config["facts"].get("text")
        return split_text(neutral_text(None if path is None else Path(path)))

    def trace(self) -> dict[str, Any]:
        """Causal tracing of the first few facts."""
        from locus.cli.trace import trace_into

        limit = self.config["trace"].get("limit")
        traced = trace_into(
            self.out / "trace", self.model, self.forget[:limit], self.method("trace")[1], resume=True
        )
        return {"report": str(self.out / "trace" / "report.html"), **traced.average_total()}

    def locate(self) -> dict[str, Any]:
        """Scores, and the mask of the best."""
        from locus.cli.locate.command import ALL_PARTS, describe, locate_mask
        from locus.fact import trainable_facts

        table = self.config["locate"]
        kept = trainable_facts(self.retain) or None
        mask, scores = locate_mask(
            self.model,
            self.forget,
            kept,
            self.method("locate")[1],
            str(table.get("budget", "1%")),
            bool(table.get("per_layer", False)),
            table.get("parts", ALL_PARTS),
            self.talking,
        )
        mask.save(self.out / "mask.safetensors")
        scores.save(self.out / "scores.safetensors")
        return {"mask": str(self.out / "mask.safetensors"), **describe(mask, self.model)}

    def edit(self) -> dict[str, Any]:
        """The edit, and the same with random masks."""
        from locus.cli.edit.controls import Edited, Wanted, make_controls
        from locus.cli.edit.edit_folder import edit_into
        from locus.mask import WeightMask

        name, editor = self.method("edit")
        mask = WeightMask.load(self.out / "mask.safetensors")
        folder, table = self.out / "edit", self.config["edit"]
        made = partial(
            edit_into, model=self.model, forget=self.forget, retain=self.retain, text=self.texts[0], method=name,
            resume=True,
        )  # fmt: skip
        delta = made(folder, mask=mask, editor=editor)
        wanted = Wanted(int(table.get("controls", 0)), table.get("control_profile", "layers"))
        _, why = make_controls(folder, Edited(self.model, editor, mask, delta), wanted, made)
        if why:
            self.talking.note(f"    controls: {why}")
        return {"delta": str(folder / "delta.safetensors"), "changed": delta.n_changed}

    def export(self) -> dict[str, Any]:
        """The edited checkpoint."""
        from locus.checkpoint_export import export
        from locus.delta import WeightDelta
        from locus.model import checkpoint_folder

        base = checkpoint_folder(self.config["model"]["name"])
        delta = WeightDelta.load(self.out / "edit" / "delta.safetensors")
        link = bool(self.config["export"].get("link", False))
        export(base, delta, self.out / "checkpoint", link=link, resume=True)
        return {"checkpoint": str(self.out / "checkpoint")}

    def audit(self) -> dict[str, Any]:
        """The judgement, with its report."""
        from locus.cli.audit import audit_into

        edits, mask = {"edited": self.out / "edit"}, self.out / "mask.safetensors"
        rest = (self.forget, self.retain, self.texts[1])
        return audit_into(
            self.out / "audit", self.model, edits, *rest, mask=mask, settings=self.method("audit")[1]
        )

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
        return Group(*parts)

    def _done(self) -> dict[str, Any]:
        from locus.files.artefact import load_json

        path = self.out / "run.json"
        return dict(load_json(path, "run")["stages"]) if path.exists() else {}

    def _discard(self, stage: str) -> None:
        """Remove a stage's artefacts that were made with other settings."""
        self.talking.note("    its settings changed: made anew")
        for name in {"locate": ("mask.safetensors", "scores.safetensors"), "export": ("checkpoint",)}.get(
            stage, (stage,)
        ):
            path = self.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


_OWN: Mapping[str, Sequence[str]] = {
    "trace": ("limit",),
    "locate": ("method", "budget", "per_layer", "parts"),
    "edit": ("method", "controls", "control_profile"),
}
"""Options of a stage that are not its method's."""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
