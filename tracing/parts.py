"""Finished facts on disk: what an interrupted run left, taken up again when nothing about it has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locus.artefact import lock
from locus.model import Model
from locus.trace import FactTrace, Trace, part_name
from tracing.corruption import Prepared


@dataclass(frozen=True)
class Parts:
    """The finished facts of one run; of none, if there is no folder."""

    folder: Path | None
    settings: Mapping[str, Any]
    model: Model
    finished: Mapping[str, FactTrace]
    """Facts of a trace that was complete already."""
    resume: bool

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, folder: Path | None, settings: Mapping[str, Any], model: Model, resume: bool
    ) -> Iterator[Parts]:
        """Hold the folder of parts for this run; it is gone afterwards if it is empty."""
        if folder is None:
            yield cls(None, settings, model, {}, False)
            return
        inner = Path(folder) / "parts"
        with lock(inner):
            yield cls(inner, settings, model, _finished(folder, settings, model) if resume else {}, resume)
        if not list(inner.glob("*.safetensors")):
            with contextlib.suppress(OSError):
                (inner / ".locus.lock").unlink(missing_ok=True)
                inner.rmdir()

    def get(self, one: Prepared) -> FactTrace | None:
        """A fact that was finished earlier, the same way."""
        if not self.resume or self.folder is None:
            return None
        done = self.finished.get(one.fact.id)
        now = (one.fact.prompt, one.fact.target, one.encoded.subject)
        if done is not None and now == (done.prompt, done.target, done.subject):
            return done
        path = self._path(self.folder, one)
        return FactTrace.load(path) if path.exists() else None

    def keep(self, one: Prepared, trace: FactTrace) -> None:
        """Write a finished fact."""
        if self.folder is not None:
            trace.save(self._path(self.folder, one))

    def drop(self, one: Prepared) -> None:
        """Forget a fact that is part of a complete trace now."""
        if self.folder is not None:
            self._path(self.folder, one).unlink(missing_ok=True)

    def _path(self, folder: Path, one: Prepared) -> Path:
        about = {
            **self.settings,
            "prompt": one.fact.prompt,
            "target": one.fact.target,
            "corrupted": list(one.positions),
        }
        return folder / part_name(one.fact.id, about, self.model.fingerprint)


def _finished(folder: Path, settings: Mapping[str, Any], model: Model) -> dict[str, FactTrace]:
    """The facts of a trace that is complete in `folder`, if it was made the same way."""
    if not (Path(folder) / "trace.safetensors").exists():
        return {}
    old = Trace.load(folder)
    same = old.fingerprint == model.fingerprint and dict(old.settings) == dict(settings)
    return {fact.fact_id: fact for fact in old} if same else {}
