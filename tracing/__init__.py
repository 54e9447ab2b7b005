"""Find where a model keeps a fact: one file per localizer, one table of them all.

Every localizer is a frozen dataclass: its fields are its settings, `run(model, facts, retain)` gives its
scores, `cost(model, facts, retain)` says beforehand what that takes.
"""

from tracing.causal import CausalTrace
from tracing.localizers.activation_norm import ActivationNorm
from tracing.localizers.controls import AllNeurons, LargestNorm, RandomLayers, RandomNeurons
from tracing.localizers.depn import PrivacyNeurons
from tracing.localizers.direct_logit import DirectLogit
from tracing.localizers.fact_lookup import FactLookup
from tracing.localizers.gradient_disagreement import ContrastiveVectors, DisagreeingTensors
from tracing.localizers.imprint import Imprint
from tracing.localizers.indirect_effect import TracedNeurons
from tracing.localizers.knowledge_neurons import KnowledgeNeurons
from tracing.localizers.learned_masks import HardConcrete, Slimming
from tracing.localizers.lookup_probe import LookupProbe
from tracing.localizers.saliency import ActivationGradient, GradientSaliency
from tracing.localizers.weight_saliency import WeightSaliency
from tracing.localizers.zero_out import ZeroOut

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
