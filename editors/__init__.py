"""Change the located weights and nothing else: one file an editor or objective, one table of them all."""

from __future__ import annotations

from editors.alphaedit import AlphaEdit
from editors.ceu import CEU
from editors.dpo import DPO
from editors.ga import GA
from editors.graddiff import GradDiff, KLMin
from editors.idk import IDK
from editors.law import LaW
from editors.lens_defence import HeadProjection, MaxEntropy
from editors.memit import MEMIT
from editors.neuron_descent import NeuronDescent
from editors.neuron_edits import NeuronDirection, NeuronFlip, NeuronMean, NeuronZero
from editors.neuron_recipes import KnowledgeNeuronRecipe, PrivacyNeuronRecipe
from editors.neuron_selective import NeuronSelective
from editors.npo import NPO
from editors.projection import EraseSubspace
from editors.retain import Retain
from editors.rkld import RKLD
from editors.rmu import RMU
from editors.rome import ROME
from editors.satimp import SatImp
from editors.selective import SelectiveGA
from editors.simnpo import SimNPO
from editors.task_vector import TaskVector
from editors.training import Training
from editors.undial import UNDIAL
from editors.wga import WGA
from editors.whp import WHP
from editors.yao import Yao

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

EDITORS: dict[str, type] = {
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
