"""The reference model as numbers: its logits on retain data, computed once for each model and text.

The base is frozen, so it can always be asked with the deltas silenced; several edits of one model on the same
retain data (controls, sweeps) can share the answers instead. They are computed for one example at a time, so that
a number never depends on what else was in the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from editors.parametrize import Trained
from locus.artefact import load_tensors, save_tensors
from locus.forward import Batch, collate, label_logits
from locus.model import Model
from locus.tokens import Encoded

KIND = "reference"
FACT_TOKENS = 16
"""Longest target that counts as a fact's: the logits of longer texts are too many to be kept unasked."""


@dataclass(frozen=True, eq=False)
class References:
    """Logits of the base that were asked before, in memory and, with a folder, on the disk."""

    model: Model
    deltas: Trained
    folder: Path | None = None
    """Where they are kept, one file an example, keyed by model, dtype and tokens; None keeps them in memory alone."""
    longest: int | None = None
    """Longest target, in tokens, whose logits are kept; a batch with a longer one is asked as it is, every time."""
    known: dict[str, Float[Tensor, "label d_vocab"]] = field(default_factory=dict)

    def logits(self, encoded: Sequence[Encoded], batch: Batch) -> Float[Tensor, "label d_vocab"]:
        """The base's logits at the labels of `batch`, whose examples are numbers in `encoded`."""
        chosen = [encoded[number] for number in batch.examples]
        if self.longest is not None and max(one.n_target for one in chosen) > self.longest:
            with torch.no_grad(), self.deltas.silenced():
                return label_logits(self.model, batch)
        return torch.cat([self._of(one) for one in chosen]).to(self.model.device)

    def _of(self, one: Encoded) -> Float[Tensor, "label d_vocab"]:
        key = self._key(one)
        if key in self.known:
            return self.known[key]
        file = None if self.folder is None else self.folder / f"{key}.safetensors"
        if file is not None and file.exists():
            return load_tensors(file, KIND)[0]["logits"]
        with torch.no_grad(), self.deltas.silenced():
            logits = label_logits(self.model, collate([one], [0])).cpu()
        if file is None:
            self.known[key] = logits
        else:
            save_tensors(file, KIND, {"logits": logits}, {"model": self.model.fingerprint})
        return logits

    def _key(self, one: Encoded) -> str:
        made_of = [self.model.fingerprint, str(self.model.dtype), list(one.ids), one.target_start]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
