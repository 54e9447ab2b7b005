"""Finished parts of an audit on disk: what an interrupted run left, taken up again if its inputs are the same.

Each state's own questions, each attack on a state and each suite is a file of its own, so that a run that was killed
loses one of them at most, and a further attack costs only itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from locus.files.artefact import load_tensors, save_tensors
from locus.input_digest import digest_of
from locus.parallel.ranks import ALONE, Ranks
from locus.parallel.serialize import packed, unpacked

_Part = TypeVar("_Part")
KIND = "audit-part"


@dataclass(frozen=True)
class FinishedParts:
    """The parts of one audit: in a folder, or nowhere."""

    folder: Path | None = None
    """Where they are kept; None keeps none."""
    there: frozenset[str] = frozenset()
    """File names that an earlier run left; the same for all processes of a job."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Digests of what every part depends on."""

    @classmethod
    def open(cls, folder: Path, resume: bool, ranks: Ranks = ALONE) -> FinishedParts:
        """The parts in a folder, or, not to be resumed, an empty one. All processes of a job call it.

        Args:
            folder: Where they are kept.
            resume: Whether parts of an earlier run may be taken.
            ranks: The processes; the first of them says what is there.
        """
        if not resume and ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        found = sorted(path.name for path in folder.glob("*.safetensors")) if resume else []
        return cls(folder, frozenset(json.loads(ranks.broadcast_object(json.dumps(found)))))

    def of(self, inputs: Mapping[str, Any]) -> FinishedParts:
        """The parts that were made from these inputs."""
        return replace(self, inputs=inputs)

    def take(self, about: Any, form: type[Any], make: Callable[[], _Part]) -> _Part:
        """A part that an earlier run finished, or else one that is made now and kept.

        Args:
            about: Which part it is: what it depends on beside the inputs of the audit.
            form: The class of the part, or of what a mapping holds.
            make: Computes it.
        """
        if self.folder is None:
            return make()
        name = f"{digest_of([dict(self.inputs), about])}.safetensors"
        path = self.folder / name
        if name in self.there:
            tensors, _ = load_tensors(path, KIND)
            found: _Part = unpacked([tensors[key] for key in sorted(tensors)], form)
            return found
        made = make()
        parts = {
            f"{i:06d}": tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(packed(made))
        }
        save_tensors(path, KIND, parts, {"form": form.__name__})
        return made
