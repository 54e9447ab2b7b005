"""Find where a model keeps a fact: one file a localizer, one table of them all.

Every localizer is a frozen dataclass: its fields are its settings, `run(model, facts, retain)` gives its
scores, `cost(model, facts, retain)` says beforehand what that takes.
"""

from tracing.activation import ActivationNorm
from tracing.causal import CausalTrace
from tracing.controls import AllNeurons, LargestNorm, RandomLayers, RandomNeurons
from tracing.saliency import ActivationGradient, GradientSaliency

LOCALIZERS = {
    "saliency": GradientSaliency,
    "activation-gradient": ActivationGradient,
    "activation": ActivationNorm,
    "random": RandomNeurons,
    "random-layers": RandomLayers,
    "largest-norm": LargestNorm,
    "all-neurons": AllNeurons,
}
"""Name on the command line -> localizer that scores neurons."""

__all__ = [
    "LOCALIZERS",
    "ActivationGradient",
    "ActivationNorm",
    "AllNeurons",
    "CausalTrace",
    "GradientSaliency",
    "LargestNorm",
    "RandomLayers",
    "RandomNeurons",
]
