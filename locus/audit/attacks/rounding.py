"""Does it survive the cast: the same questions after bfloat16, int8 and int4 round-to-nearest.

An edit smaller than half a quantization step is rounded away, and the forgotten comes back (Zhang et al.
2024, arXiv:2410.16454). Rounding hurts the base as well, so an edit is read beside the rounded base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from locus.audit.measurement import Rounded
from locus.audit.questions import Questions, ask
from locus.audit.settings import WEIGHT_FORMATS, WeightFormat
from locus.metrics import round_to_nearest
from locus.model import Model
from locus.weight_source import refuse_offloaded

INT4_GROUP = 64


def survive_rounding(
    model: Model,
    forget: Questions,
    held_out: Questions,
    formats: tuple[WeightFormat, ...] = WEIGHT_FORMATS,
    max_tokens: int = 4096,
) -> tuple[Rounded, ...]:
    """Ask the forget questions under each rounding, the held-out ones under int4; the weights come back to the bit."""
    results = []
    for fmt in formats:
        others = held_out if fmt == "int4" else Questions((), (), ())
        with rounded_weights(model, fmt):
            results.append(Rounded(fmt, ask(model, forget, max_tokens), ask(model, others, max_tokens)))
    return tuple(results)


@contextlib.contextmanager
def rounded_weights(model: Model, fmt: WeightFormat) -> Iterator[None]:
    """Round the model's weights in place, and put the exact old ones back on leaving.

    bfloat16 casts every parameter. int8 (one scale an output) and int4 (one scale for 64 inputs of an
    output) round the matrices of the blocks, as common loaders do: embeddings, unembedding, norms and
    biases stay. Needs the memory of the rounded tensors once more.
    """
    refuse_offloaded(dict(model.module.named_parameters()))
    saved: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                if (new := _rounded(model, name, parameter, fmt)) is not None:
                    saved[name] = parameter.detach().clone()
                    parameter.copy_(new)
        yield
    finally:
        with torch.no_grad():
            for name, old in saved.items():
                model.module.get_parameter(name).copy_(old)


def _rounded(model: Model, name: str, parameter: Tensor, fmt: WeightFormat) -> Tensor | None:
    """The rounded tensor, or None where this format leaves it alone."""
    if fmt == "bfloat16":
        return None if parameter.dtype == torch.bfloat16 else parameter.to(torch.bfloat16).to(parameter.dtype)
    if parameter.dim() != 2 or not any(name.startswith(f"{block}.") for block in model.atlas.blocks):
        return None
    owner = model.module.get_submodule(name.rpartition(".")[0])
    by_input = type(owner).__name__ == "Conv1D"  # GPT-2 stores its matrices as [in, out]
    bits, group = (8, None) if fmt == "int8" else (4, INT4_GROUP)
    weight = parameter.detach().T if by_input else parameter.detach()
    new = round_to_nearest(weight, bits, group)
    return new.T if by_input else new
