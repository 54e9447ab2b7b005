"""locus finds where a language model keeps the knowledge that must go, and removes it there.

    facts ──> tracing ──> scores ──> mask ──> editors ──> delta ──> checkpoint ──> audit

This package holds the nouns of that walk; `tracing` finds, `editors` changes. Names are imported when
they are first used, so that `import locus` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "errors",
    "Example": "fact",
    "Fact": "fact",
    "read_facts": "fact",
    "neutral_text": "fact",
    "Model": "model",
    "load_model": "model",
    "wrap": "model",
    "bridge": "model",
    "measure": "forward",
    "NeuronScores": "scores",
    "WeightMask": "mask",
    "WeightDelta": "delta",
    "export": "checkpoint_export",
    "revert": "checkpoint_export",
    "diff": "checkpoint_export",
}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from locus.checkpoint_export import diff, export, revert
    from locus.delta import WeightDelta
    from locus.errors import InputError
    from locus.fact import Example, Fact, neutral_text, read_facts
    from locus.forward import measure
    from locus.mask import WeightMask
    from locus.model import Model, bridge, load_model, wrap
    from locus.scores import NeuronScores


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'locus' has no attribute {name!r}")
    return getattr(importlib.import_module(f"locus.{_HOME[name]}"), name)
