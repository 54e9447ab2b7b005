"""What the tests of direct edits share: facts, text, and the claim that memory is untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from editors.key_value.edit_target import EditTarget
from editors.training.unchanged import weights_unchanged
from locus.fact import Fact
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from tests.tiny import tiny_facts

TEXT = (
    "The city of Rome is in Italy. Berlin is the capital of Germany.",
    "The Colosseum is in the city of Rome. What language does François Truffaut speak?",
    "Paris is not far. The capital of Italy is Rome.",
)
ARCHITECTURES = ("llama", "gpt2", "neox", "gemma2", "opt")
"""Linear and Conv1D, sequential and parallel, post-norm, biases."""
QUICK = EditTarget(refusal=" Berlin", prefixes=0, steps=12, kl=0.0, prob_stop=0.0)


def facts() -> list[Fact]:
    return tiny_facts()


def down(model: Model, *layers: int) -> WeightMask:
    """Whole down projections of some layers; of all by default."""
    names = [
        part.param
        for layer, parts in enumerate(model.atlas.neurons)
        for part in parts
        if part.role == "down" and (not layers or layer in layers)
    ]
    return WeightMask.of_parameters(names, shapes_of(model.module), model.fingerprint)


@contextlib.contextmanager
def untouched(model: Model) -> Iterator[None]:
    """The model in memory is bit for bit the same afterwards."""
    with weights_unchanged(model.module):
        yield
