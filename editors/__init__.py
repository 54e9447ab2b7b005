"""Change the located weights and nothing else: one file an editor or objective, one table of them all."""

from __future__ import annotations

from editors.closed_form.alphaedit import AlphaEdit
from editors.closed_form.knowledge_washing import LaW
from editors.closed_form.late_suppression import LateSuppression
from editors.closed_form.memit import MEMIT
from editors.closed_form.rome import ROME
from editors.closed_form.subspace_projection import EraseSubspace
from editors.editor import Editor
from editors.neurons.neuron_descent import NeuronDescent
from editors.neurons.neuron_edits import NeuronDirection, NeuronFlip, NeuronMean, NeuronZero
from editors.neurons.neuron_recipes import KnowledgeNeuronRecipe, PrivacyNeuronRecipe
from editors.neurons.neuron_selective import NeuronSelective
from editors.objectives.ceu import CEU
from editors.objectives.dpo import DPO
from editors.objectives.ga import GA
from editors.objectives.graddiff import GradDiff, KLMin
from editors.objectives.idk import IDK
from editors.objectives.lens_defence import HeadProjection, MaxEntropy
from editors.objectives.npo import NPO
from editors.objectives.rkld import RKLD
from editors.objectives.rmu import RMU
from editors.objectives.satimp import SatImp
from editors.objectives.selective_ga import SelectiveGA
from editors.objectives.simnpo import SimNPO
from editors.objectives.undial import UNDIAL
from editors.objectives.wga import WGA
from editors.objectives.yao import Yao
from editors.training.retain import Retain
from editors.training.settings import Training
from editors.two_stage.task_vector import TaskVector
from editors.two_stage.whp import WHP

OBJECTIVES: dict[str, type] = {
    "ga": GA,
    "graddiff": GradDiff,
    "kl-min": KLMin,
    "yao": Yao,
    "selective-ga": SelectiveGA,
    "npo": NPO,
    "simnpo": SimNPO,
    "dpo": DPO,
    "idk": IDK,
    "rmu": RMU,
    "rkld": RKLD,
    "undial": UNDIAL,
    "ceu": CEU,
    "wga": WGA,
    "satimp": SatImp,
    "head-projection": HeadProjection,
    "max-entropy": MaxEntropy,
}
"""Objectives of the masked training loop, by their names on the command line."""

EDITORS: dict[str, type[Editor]] = {
    **OBJECTIVES,
    "whp": WHP,
    "task-vector": TaskVector,
    "neuron-zero": NeuronZero,
    "neuron-flip": NeuronFlip,
    "neuron-mean": NeuronMean,
    "neuron-direction": NeuronDirection,
    "neuron-selective": NeuronSelective,
    "neuron-descent": NeuronDescent,
    "knowledge-neurons": KnowledgeNeuronRecipe,
    "depn": PrivacyNeuronRecipe,
    "rome": ROME,
    "memit": MEMIT,
    "alphaedit": AlphaEdit,
    "law": LaW,
    "late-suppression": LateSuppression,
    "projection": EraseSubspace,
}
"""Everything with a `run`: the trained objectives and the direct edits of weights."""

__all__ = [
    "CEU",
    "DPO",
    "EDITORS",
    "GA",
    "IDK",
    "MEMIT",
    "NPO",
    "OBJECTIVES",
    "RKLD",
    "RMU",
    "ROME",
    "UNDIAL",
    "WGA",
    "WHP",
    "AlphaEdit",
    "EraseSubspace",
    "GradDiff",
    "HeadProjection",
    "KLMin",
    "KnowledgeNeuronRecipe",
    "LaW",
    "LateSuppression",
    "MaxEntropy",
    "NeuronDescent",
    "NeuronDirection",
    "NeuronFlip",
    "NeuronMean",
    "NeuronSelective",
    "NeuronZero",
    "PrivacyNeuronRecipe",
    "Retain",
    "SatImp",
    "SelectiveGA",
    "SimNPO",
    "TaskVector",
    "Training",
    "Yao",
]
