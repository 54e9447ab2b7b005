"""The reference model as numbers: what the base says of retain data, asked once for each example.

The base is frozen, so it can always be asked with the deltas silenced; an example that comes again, also in another
edit of the same model (controls, sweeps), is not asked again. What is kept are the states that the base unembeds,
d_model numbers a target token; the logits are made of them when they are needed, by the model's own way from there.
States are computed for one example at a time, so that they never depend on what else was in the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from editors.training.parametrize import Trained
from locus.files.artefact import load_tensors, save_tensors
from locus.forward import Batch, collate, head_logits, label_states, unembedded
from locus.model import Model
from locus.tokens import Encoded

KIND = "reference"
MOST_BYTES = 1 << 29
"""States that are kept in memory; beyond that the base is asked every time."""


_SAID: WeakKeyDictionary[nn.Module, tuple[Mapping[str, str], dict[str, Tensor]]] = WeakKeyDictionary()


def said_before(module: nn.Module, base: Mapping[str, str]) -> dict[str, Float[Tensor, "label d_model"]]:
    """What earlier edits have asked of a model in memory, by key, to be added to; nothing where its weights are others.

    Args:
        module: The model; with it goes what it said.
        base: Digests of its tensors (`editors.training.unchanged.every_digest`).
    """
    digests, said = _SAID.get(module, (None, {}))
    if digests != base:
        digests, said = base, {}
        _SAID[module] = (base, said)
    return said


@dataclass(frozen=True, eq=False)
class References:
    """States of the base that were asked before, in memory or, with a folder, on the disk."""

    model: Model
    deltas: Trained
    folder: Path | None = None
    """Where they are kept, one file an example, keyed by model, dtype and tokens; None keeps them in memory."""
    most_bytes: int = MOST_BYTES
    """Of the memory."""
    known: dict[str, Float[Tensor, "label d_model"]] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "label d_vocab"]:
        """The base's logits at the labels of `batch`, whose examples are numbers in `encoded`; in float32."""
        states = torch.cat([self._of(encoded[number]) for number in batch.examples])
        with self.deltas.silenced():
            return self.logits_of(self.model, states)

    @cached_property
    def logits_of(self) -> Callable[[Model, Tensor], Tensor]:
        """How states become logits: by the unembedding alone, if a random state shows that nothing comes behind it."""
        probe = torch.randn(1, self.model.atlas.d_model, generator=torch.Generator().manual_seed(0))
        alone, whole = (way(self.model, probe.to(self.model.dtype)) for way in (head_logits, unembedded))
        return head_logits if torch.equal(alone, whole) else unembedded

    def _of(self, one: Encoded) -> Float[Tensor, "label d_model"]:
        key = self._key(one)
        if key in self.known:
            return self.known[key]
        file = None if self.folder is None else self.folder / f"{key}.safetensors"
        if file is not None and file.exists():
            return load_tensors(file, KIND)[0]["states"]
        with self.deltas.silenced():
            states = label_states(self.model, collate([one], [0])).cpu()
        if file is not None:
            save_tensors(file, KIND, {"states": states}, {"model": self.model.fingerprint})
        elif sum(kept.nbytes for kept in self.known.values()) + states.nbytes <= self.most_bytes:
            self.known[key] = states
        return states

    def _key(self, one: Encoded) -> str:
        made_of = [self.model.fingerprint, str(self.model.dtype), list(one.ids), one.target_start]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
