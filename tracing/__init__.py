"""Find where a model keeps a fact: one file a localizer, one table of them all.

Every localizer is a frozen dataclass: its fields are its settings, `run(model, facts, retain)` gives its
scores, `cost(model, facts, retain)` says beforehand what that takes.
"""

from tracing.activation import ActivationNorm
from tracing.causal import CausalTrace
from tracing.controls import AllNeurons, LargestNorm, RandomLayers, RandomNeurons
from tracing.depn import PrivacyNeurons
from tracing.direct import DirectLogit
from tracing.imprint import Imprint
from tracing.knowledge_neurons import KnowledgeNeurons
from tracing.lookup import FactLookup
from tracing.lookup_probe import LookupProbe
from tracing.neuron_masks import HardConcrete, Slimming
from tracing.saliency import ActivationGradient, GradientSaliency
from tracing.similarity import ContrastiveVectors, DisagreeingTensors
from tracing.traced import TracedNeurons
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
    "direct-logit": DirectLogit,
    "traced-neurons": TracedNeurons,
    "fact-lookup": FactLookup,
    "lookup-probe": LookupProbe,
    "weight-saliency": WeightSaliency,
    "contrastive-vectors": ContrastiveVectors,
    "disagreeing-tensors": DisagreeingTensors,
    "random": RandomNeurons,
    "random-layers": RandomLayers,
    "largest-norm": LargestNorm,
    "all-neurons": AllNeurons,
}
"""Name on the command line -> localizer. All score neurons but "weight-saliency" (single weights),
"contrastive-vectors" (rows or columns) and "disagreeing-tensors" (whole tensors)."""

__all__ = [
    "LOCALIZERS",
    "ActivationGradient",
    "ActivationNorm",
    "AllNeurons",
    "CausalTrace",
    "ContrastiveVectors",
    "DirectLogit",
    "DisagreeingTensors",
    "FactLookup",
    "GradientSaliency",
    "HardConcrete",
    "Imprint",
    "KnowledgeNeurons",
    "LargestNorm",
    "LookupProbe",
    "PrivacyNeurons",
    "RandomLayers",
    "RandomNeurons",
    "Slimming",
    "TracedNeurons",
    "WeightSaliency",
    "ZeroOut",
]
