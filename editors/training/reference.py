"""Stored states of the reference model: the base runs once per retain example, not once per step.

The reference model is the frozen base with the deltas silenced. Its state before the unembedding (d_model numbers per
target token) is stored, and reused when the example comes again, also in another edit of the same model (controls,
sweeps). Logits are computed from the stored state when they are needed. Each state is computed for one example alone,
so it does not depend on the rest of a batch.

A state's key is the digest of what it was computed from: weights and buffers in memory, configuration, dtype, tokens.
States go to the disk only when the run has shown that no weight of the base moved (`References.commit`).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from editors.training.parametrize import Trained
from editors.training.unchanged import every_digest
from locus.files.artefact import load_tensors, save_tensors
from locus.fingerprint import configuration
from locus.forward import Batch, collate, head_logits, label_states, unembedded
from locus.model import Model
from locus.tokens import Encoded

KIND = "reference"
MOST_BYTES = 1 << 29
"""Bytes of states that are stored in memory; beyond that the base is asked every time."""


_SAID: WeakKeyDictionary[nn.Module, tuple[Mapping[str, str], dict[str, Tensor]]] = WeakKeyDictionary()


def known_states(module: nn.Module, base: Mapping[str, str]) -> dict[str, Float[Tensor, "label d_model"]]:
    """States stored by earlier edits of a model in memory, by key; empty where its weights have changed since.

    Args:
        module: The model; its states are freed with it.
        base: Digests of its tensors (`editors.training.unchanged.every_digest`).
    """
    digests, said = _SAID.get(module, (None, {}))
    if digests != base:
        digests, said = base, {}
        _SAID[module] = (base, said)
    return said


@dataclass(frozen=True, eq=False)
class References:
    """States of the base, stored in memory or, with a folder, on disk."""

    model: Model
    """The base in memory."""
    deltas: Trained
    """The trained values, silenced while the base runs."""
    folder: Path | None = None
    """Folder of one file per example, named by its key; None stores in memory."""
    most_bytes: int = MOST_BYTES
    """Bytes of states that may be stored in memory."""
    known: dict[str, Float[Tensor, "label d_model"]] = field(default_factory=dict)
    """Key -> states stored in memory."""
    base: Mapping[str, str] | None = None
    """Digests of the base's tensors in memory; None computes them."""

    @cached_property
    def made_from(self) -> str:
        """Digest of all that a state is computed from, except the example."""
        weights = every_digest(self.model.module) if self.base is None else dict(self.base)
        parts = [weights, configuration(self.model.module), str(self.model.dtype), self.model.device.type]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _unchecked(self) -> tempfile.TemporaryDirectory[str]:
        """Folder of the states of this run, beside those that are checked; it goes with the run."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.folder, prefix=".unchecked-")

    def commit(self) -> None:
        """Keep the states of this run on disk for later runs: call it once no weight of the base has moved."""
        if self.folder is None or "_unchecked" not in self.__dict__:
            return
        for file in Path(self._unchecked.name).glob("*.safetensors"):
            file.replace(self.folder / file.name)
        self._unchecked.cleanup()
        del self.__dict__["_unchecked"]

    @torch.no_grad()
    def logits(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "label d_vocab"]:
        """The base's logits at the labels of `batch`, whose examples are numbers in `encoded`; in float32."""
        states = torch.cat([self._of(encoded[number]) for number in batch.examples])
        with self.deltas.silenced():
            return self.logits_of(self.model, states)

    @cached_property
    def logits_of(self) -> Callable[[Model, Tensor], Tensor]:
        """How states become logits: by the unembedding alone, if a random state shows that nothing follows it."""
        probe = torch.randn(1, self.model.atlas.d_model, generator=torch.Generator().manual_seed(0))
        alone, whole = (way(self.model, probe.to(self.model.dtype)) for way in (head_logits, unembedded))
        return head_logits if torch.equal(alone, whole) else unembedded

    def _of(self, one: Encoded) -> Float[Tensor, "label d_model"]:
        key = self._key(one)
        if key in self.known:
            return self.known[key]
        if (stored := self._stored(key)) is not None:
            return stored
        with self.deltas.silenced():
            states = label_states(self.model, collate([one], [0])).cpu()
        if self.folder is not None:
            path = Path(self._unchecked.name) / f"{key}.safetensors"
            save_tensors(path, KIND, {"states": states}, {"model": self.model.fingerprint})
        elif sum(kept.nbytes for kept in self.known.values()) + states.nbytes <= self.most_bytes:
            self.known[key] = states
        return states

    def _key(self, one: Encoded) -> str:
        parts = [self.made_from, list(one.ids), one.target_start]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _stored(self, key: str) -> Float[Tensor, "label d_model"] | None:
        """The states on disk under this key, from an earlier run or from this one."""
        if self.folder is None:
            return None
        ours = [Path(self._unchecked.name)] if "_unchecked" in self.__dict__ else []
        for folder in (self.folder, *ours):
            if (file := folder / f"{key}.safetensors").exists():
                return load_tensors(file, KIND)[0]["states"]
        return None
