"""Finished facts on disk: what an interrupted run left, taken up again when nothing about it has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locus.errors import InputError
from locus.input_digest import digest_of, model_digests
from locus.model import Model
from locus.parallel.ranks import ALONE, Ranks
from locus.trace import FactTrace, Trace
from tracing.patching.corruption import Prepared


@dataclass(frozen=True)
class FinishedFacts:
    """The finished facts of one run: in a folder, or in memory if there is none."""

    folder: Path | None
    """Where the whole trace goes; parts are kept in a folder inside."""
    settings: Mapping[str, Any]
    model: Model
    finished: Mapping[str, FactTrace]
    """Facts of a trace that was complete already."""
    resume: bool
    ranks: Ranks
    model_inputs: Mapping[str, str] = field(default_factory=dict)
    """Digests of what the model's answers depend on."""
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
    ) -> Iterator[FinishedFacts]:
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
            asked = model_digests(model)
            finished = _finished(folder, settings, asked) if resume else {}
            yield cls(Path(folder), settings, model, finished, resume, ranks, asked)
            ranks.barrier()
        if ranks.first and not list(inner.glob("*.safetensors")):
            with contextlib.suppress(OSError):
                (inner / ".locus.lock").unlink(missing_ok=True)
                inner.rmdir()

    def share(self, packs: Sequence[Sequence[Prepared]]) -> Iterator[Sequence[Prepared]]:
        """The packs of facts that this process traces: all, or of several processes' the next; longest first."""
        if self.ranks.size > 1:
            about = [
                dict(self.settings),
                dict(self.model_inputs),
                [[one.fact for one in pack] for pack in packs],
            ]
            self.ranks.agree("facts, settings or weights", digest_of(about))
        packs = sorted(packs, key=lambda p: -max(one.encoded.target_start for one in p))
        yield from self.ranks.share(packs, "tracing facts")
        self.ranks.barrier()

    def get(self, one: Prepared) -> FactTrace | None:
        """A fact that was finished earlier, the same way."""
        if not self.resume or self.folder is None:
            return None
        if (done := self.finished.get(digest_of(one.fact))) is not None:
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

    def inputs(self, facts: Sequence[Prepared]) -> dict[str, Any]:
        """What the trace is made from, to be kept in it."""
        return {
            "model": dict(self.model_inputs or model_digests(self.model)),
            "facts": {one.fact.id: digest_of(one.fact) for one in facts},
        }

    def _path(self, folder: Path, one: Prepared) -> Path:
        """Its name changes with the fact, the settings and the model, and with nothing else."""
        about = [dict(self.settings), dict(self.model_inputs), one.fact, list(one.positions)]
        return folder / "parts" / f"{digest_of(about)}.safetensors"


def _finished(
    folder: Path, settings: Mapping[str, Any], model_inputs: Mapping[str, str]
) -> dict[str, FactTrace]:
    """The facts of a trace that is complete in `folder`, by their digests, if it was made the same way."""
    if not (Path(folder) / "trace.safetensors").exists():
        return {}
    old = Trace.load(folder)
    if old.inputs.get("model") != model_inputs or dict(old.settings) != dict(settings):
        return {}
    digests = old.inputs["facts"]
    return {digests[fact.fact_id]: fact for fact in old if fact.fact_id in digests}
