"""Find where a model keeps a fact: one file a localizer, one table of them all.

Every localizer is a frozen dataclass: its fields are its settings, `run(model, facts, retain)` gives its
scores, `cost(model, facts, retain)` says beforehand what that takes.
"""

from tracing.activation import ActivationNorm
from tracing.causal import CausalTrace
from tracing.controls import AllNeurons, LargestNorm, RandomLayers, RandomNeurons
from tracing.depn import PrivacyNeurons
from tracing.imprint import Imprint
from tracing.knowledge_neurons import KnowledgeNeurons
from tracing.neuron_masks import HardConcrete, Slimming
from tracing.saliency import ActivationGradient, GradientSaliency
from tracing.weights import WeightSaliency
from tracing.zero_out import ZeroOut

LOCALIZERS = {
    "saliency": GradientSaliency,
    "activation-gradient": ActivationGradient,
    "activation-norm": ActivationNorm,
    "knowledge-neurons": KnowledgeNeurons,
    "depn": PrivacyNeurons,
    "zero-out": ZeroOut,
    "slimming": Slimming,
    "hard-concrete": HardConcrete,
    "imprint": Imprint,
    "weight-saliency": WeightSaliency,
    "random": RandomNeurons,
    "random-layers": RandomLayers,
    "largest-norm": LargestNorm,
    "all-neurons": AllNeurons,
}
"""Name on the command line -> localizer that scores neurons (or single weights: "weight-saliency")."""

__all__ = [
    "LOCALIZERS",
    "ActivationGradient",
    "ActivationNorm",
    "AllNeurons",
    "CausalTrace",
    "GradientSaliency",
    "HardConcrete",
    "Imprint",
    "KnowledgeNeurons",
    "LargestNorm",
    "PrivacyNeurons",
    "RandomLayers",
    "RandomNeurons",
    "Slimming",
    "WeightSaliency",
    "ZeroOut",
]
