"""Weights by name, wherever they are: a checkpoint, a model in memory, a mapping of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from locus.checkpoint import Checkpoint
from locus.errors import InputError
from locus.fingerprint import fingerprint_of
from locus.parameter_names import resolve

if TYPE_CHECKING:
    from locus.model import Model


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of one state of a model."""

    names: tuple[str, ...]
    """Tied parameters once."""
    read: Callable[[str], Tensor]
    """A tensor by the model's or the checkpoint's name for it, on the CPU; raises InputError if there is none."""
    fingerprint: Callable[[], str]
    """Of the whole model; "" where only some of its tensors are here."""


def stored(weights: Model | nn.Module | Checkpoint | Mapping[str, Tensor]) -> Weights:
    """The weights as they were stored: of a `Model` that was read from a folder, the checkpoint there."""
    if isinstance(weights, Checkpoint):
        return Weights(tuple(weights.shapes), weights.tensor, weights.fingerprint)
    if isinstance(weights, nn.Module | Mapping) or weights.folder is None:
        return in_memory(weights)
    model, checkpoint = weights, Checkpoint(weights.folder)
    return Weights(tuple(checkpoint.shapes), checkpoint.tensor, lambda: model.fingerprint)


def in_memory(weights: Model | nn.Module | Checkpoint | Mapping[str, Tensor]) -> Weights:
    """The weights as they are now: of a `Model`, what its parameters hold."""
    if isinstance(weights, Checkpoint):
        return stored(weights)
    if isinstance(weights, Mapping):
        given = weights
        return Weights(
            tuple(given),
            lambda name: given[resolve(name, given, "the tensors given")].detach().cpu(),
            lambda: "",
        )
    module = module_of(weights)
    held = dict(module.named_parameters(remove_duplicate=False))
    return Weights(
        tuple(name for name, _ in module.named_parameters()),
        lambda name: held[resolve(name, held, "the model")].detach().cpu(),
        lambda: fingerprint_of(module),
    )


def held(model: Model, name: str) -> Tensor:
    """A parameter as it is in memory; one that accelerate has offloaded, as the checkpoint has it, on the CPU."""
    parameter = model.module.get_parameter(name)
    return stored(model).read(name).to(parameter.dtype) if parameter.is_meta else parameter.detach()


def refuse_offloaded(parameters: Mapping[str, Tensor]) -> None:
    """Refuse to change parameters that accelerate keeps elsewhere: what is written in memory would be lost.

    Raises:
        InputError: one of them is offloaded; says which.
    """
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise InputError(
                f"{name}: offloaded, so it cannot be changed in memory; load the model without a device_map that "
                "offloads (of several processes, `locus edit --shard` holds what no device holds whole)"
            )


def module_of(model: Model | nn.Module) -> nn.Module:
    """The transformers model itself."""
    return model if isinstance(model, nn.Module) else model.module
