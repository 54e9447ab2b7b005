"""One yardstick for direct edits: what went, what stayed, and that nothing else moved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors.training.unchanged import weights_unchanged
from locus.delta import WeightDelta
from locus.fact import Example, Fact
from locus.forward import Batch, batches, label_logits, measure
from locus.mask import WeightMask
from locus.metrics import kl_divergence
from locus.model import Model
from locus.tokens import encode_text


@dataclass(frozen=True, eq=False)
class Yardstick:
    """Facts and texts, and what the base makes of them."""

    model: Model
    forget: Sequence[Fact]
    neighbours: Sequence[Example]
    """Those that the base has right."""
    held_out: Sequence[Fact]
    """Those that the base has right."""
    text: Sequence[Batch]
    base_logits: Sequence[Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: Model, forget: Sequence[Fact], held_out: Sequence[Fact], text: Sequence[str]
    ) -> Yardstick:
        """Ask the base."""
        neighbours = list(dict.fromkeys(n for fact in forget for n in fact.neighbours))
        blocks = batches([block for paragraph in text for block in encode_text(model, paragraph)])
        return cls(
            model,
            forget,
            right(model, neighbours),
            right(model, held_out),
            blocks,
            [label_logits(model, batch) for batch in blocks],
        )

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The model as it is in memory now."""
        facts = measure(self.model, self.forget)
        paraphrases = measure(self.model, [e for fact in self.forget for e in fact.paraphrase_examples])
        kls = [
            kl_divergence(base, label_logits(self.model, batch))
            for batch, base in zip(self.text, self.base_logits, strict=True)
        ]
        return {
            "p": float(facts.prob.mean()),
            "right": float(facts.correct.float().mean()),
            "paraphrase_p": float(paraphrases.prob.mean()),
            "paraphrase_right": float(paraphrases.correct.float().mean()),
            "neighbours": self._kept(self.neighbours),
            "held_out": self._kept(self.held_out),
            "kl": float(torch.cat(kls).mean()) if kls else 0.0,
        }

    def _kept(self, examples: Sequence[Example | Fact]) -> float:
        return float(measure(self.model, examples).correct.float().mean()) if examples else float("nan")

    def row(self, mask: WeightMask, edit: Callable[[], WeightDelta]) -> dict[str, Any]:
        """Edit, check that only the mask moves and that memory does not, and read the yardstick."""
        start, worked = time.monotonic(), time.process_time()
        with weights_unchanged(self.model.module):
            delta = edit()
            seconds, cpu = time.monotonic() - start, time.process_time() - worked
            assert delta.outside(mask) == 0, "weights outside the mask differ"
            assert delta.n_changed > 0, "nothing was edited"
            with delta.applied(self.model):
                found = self.read()
        return {
            **found,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "weights": delta.n_changed,
            "norm": delta.norm,
            "outcome": json.loads(json.dumps(dict(delta.provenance), default=str)),
        }


def kept_row(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The row in a file, or else a new one, which is written there."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found
    row = dict(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1), "utf-8")
    part.replace(path)
    return row


def right(model: Model, examples: Sequence[Any]) -> list[Any]:
    """Those of the examples whose every target token is the model's first choice."""
    if not examples:
        return []
    correct = measure(model, examples).correct.tolist()
    return [one for one, is_right in zip(examples, correct, strict=True) if is_right]
