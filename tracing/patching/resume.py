"""Finished facts on disk: what an interrupted run left, taken up again when nothing about it has changed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locus.errors import InputError
from locus.model import Model
from locus.parallel.ranks import ALONE, Ranks
from locus.trace import FactTrace, Trace, part_name
from tracing.patching.corruption import Prepared


@dataclass(frozen=True)
class Parts:
    """The finished facts of one run: in a folder, or in memory if there is none."""

    folder: Path | None
    """Where the whole trace goes; parts are kept in a folder inside."""
    settings: Mapping[str, Any]
    model: Model
    finished: Mapping[str, FactTrace]
    """Facts of a trace that was complete already."""
    resume: bool
    ranks: Ranks
    here: dict[str, FactTrace] = field(default_factory=dict)
    """Facts that this process has at hand."""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        folder: Path | None,
        settings: Mapping[str, Any],
        model: Model,
        resume: bool,
        ranks: Ranks = ALONE,
    ) -> Iterator[Parts]:
        """Hold the folder of parts for this run; it is gone afterwards if it is empty.

        Raises:
            InputError: several processes and no folder to exchange facts through; another run holds it.
        """
        if folder is None:
            if ranks.size > 1:
                raise InputError("several processes trace together through a folder: give one")
            yield cls(None, settings, model, {}, False, ranks)
            return
        inner = Path(folder) / "parts"
        with ranks.hold(inner):
            finished = _finished(folder, settings, model) if resume else {}
            yield cls(Path(folder), settings, model, finished, resume, ranks)
            ranks.barrier()
        if ranks.first and not list(inner.glob("*.safetensors")):
            with contextlib.suppress(OSError):
                (inner / ".locus.lock").unlink(missing_ok=True)
                inner.rmdir()

    def share(self, packs: Sequence[Sequence[Prepared]]) -> Iterator[Sequence[Prepared]]:
        """The packs of facts that this process traces: all, or of several processes' the next, longest first."""
        if self.ranks.size > 1:
            about = [self.settings, self.model.fingerprint, [[one.fact.id for one in pack] for pack in packs]]
            self.ranks.agree("facts, settings or weights", json.dumps(about, sort_keys=True))
            packs = sorted(packs, key=lambda p: sum(one.positions[0] - one.encoded.target_start for one in p))
        yield from self.ranks.share(packs, "tracing facts")
        self.ranks.barrier()

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
        self.here[one.fact.id] = trace
        if self.folder is not None:
            trace.save(self._path(self.folder, one))

    def collect(self, one: Prepared) -> FactTrace:
        """A fact that this process or another has finished, once all of them have.

        Raises:
            InputError: another process has finished it, but into a folder that this one does not see.
        """
        if self.folder is None or one.fact.id in self.here:
            return self.here[one.fact.id]
        if (done := self.get(one)) is not None:
            return done
        path = self._path(self.folder, one)
        if not self.ranks.seen(path):
            raise InputError(
                f"{path}: another process wrote it, this one does not see it: give an output folder that all "
                "processes share"
            )
        return FactTrace.load(path)

    def finish(self, trace: Trace, facts: Sequence[Prepared]) -> None:
        """Write the whole trace, and forget the parts of it."""
        self.ranks.barrier()
        if self.folder is None or not self.ranks.first:
            return
        trace.save(self.folder)
        for one in facts:
            self._path(self.folder, one).unlink(missing_ok=True)

    def _path(self, folder: Path, one: Prepared) -> Path:
        about = {
            **self.settings,
            "prompt": one.fact.prompt,
            "target": one.fact.target,
            "corrupted": list(one.positions),
        }
        return folder / "parts" / part_name(one.fact.id, about, self.model.fingerprint)


def _finished(folder: Path, settings: Mapping[str, Any], model: Model) -> dict[str, FactTrace]:
    """The facts of a trace that is complete in `folder`, if it was made the same way."""
    if not (Path(folder) / "trace.safetensors").exists():
        return {}
    old = Trace.load(folder)
    same = old.fingerprint == model.fingerprint and dict(old.settings) == dict(settings)
    return {fact.fact_id: fact for fact in old} if same else {}
