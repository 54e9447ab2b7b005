"""LoRA confined to located matrices: low-rank deltas through peft, with the interface of `Deltas`.

Hu et al. 2021 (arXiv:2106.09685). peft builds the adapted layers; they stand in the places of the located
matrices only while `attached`, and what comes out is the dense change of those matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from locus.errors import InputError
from locus.mask import WeightMask
from locus.random_streams import generator
from locus.selection import Selection


class LoraDeltas:
    """Low-rank deltas of the whole matrices of a mask."""

    def __init__(self, module: nn.Module, mask: WeightMask, rank: int, seed: int) -> None:
        """Adapters of rank `rank` and scale 2, zero at first; the module is not touched before `attached`.

        They are float32 where the base is half precision.

        Args:
            module: The base.
            mask: Whole matrices that may change.
            rank: Rank of each change.
            seed: Seed of the adapters' first values.

        Raises:
            InputError: peft is not installed, or the mask selects something other than whole Linear or Conv1D
                matrices (a low-rank change of a matrix moves all of it).
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise InputError("LoRA needs peft: pip install 'locus-unlearn[lora]'") from error
        self._module = module
        self.selections: dict[str, Selection] = dict(mask.entries)
        self._paths = {name: _adaptable(module, name, s) for name, s in self.selections.items()}
        shell = nn.Module()
        for i, path in enumerate(self._paths.values()):
            shell.add_module(f"m{i}", module.get_submodule(path))
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=[f"m{i}" for i in range(len(self._paths))]
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "lora", 0).initial_seed())
            inject_adapter_in_model(config, shell)
        self._bases = {name: module.get_submodule(path) for name, path in self._paths.items()}
        self._adapted: dict[str, Any] = {
            name: shell.get_submodule(f"m{i}") for i, name in enumerate(self._paths)
        }
        self.values: dict[str, nn.Parameter] = {
            f"{name}/{part}": parameter
            for name, layer in self._adapted.items()
            for part, parameter in layer.named_parameters()
            if "lora_" in part
        }
        for parameter in self.values.values():
            # peft makes them in the base's dtype; updates of half-precision adapters would be rounded away.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors."""
        return list(self.values.values())

    @property
    def n_weights(self) -> int:
        """Number of weights that can move."""
        return sum(selection.n for selection in self.selections.values())

    @contextlib.contextmanager
    def attached(self) -> Iterator[LoraDeltas]:
        """Put the adapted layers in place of the located ones inside the block."""
        try:
            for name, path in self._paths.items():
                self._module.set_submodule(path, self._adapted[name])
            yield self
        finally:
            for name, path in self._paths.items():
                self._module.set_submodule(path, self._bases[name])

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Inside the block the module is the reference model again."""
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def dense(self, name: str) -> Tensor:
        """The change of one parameter, in its own layout."""
        change: Tensor = self._adapted[name].get_delta_weight("default")
        return change.detach()

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the adapters' weights, in place."""
        for name, value in self.values.items():
            value.copy_(values[name])

    def _enable(self, enabled: bool) -> None:
        for layer in self._adapted.values():
            layer.enable_adapters(enabled)


def _adaptable(module: nn.Module, name: str, selection: Selection) -> str:
    """Path of the module whose matrix is located, when LoRA can change all of it and nothing else."""
    from transformers.pytorch_utils import Conv1D

    path, _, attribute = name.rpartition(".")
    holder = module.get_submodule(path)
    shared = sum(p is getattr(holder, attribute) for m in module.modules() for p in m._parameters.values())
    if selection.kind != "all":
        raise InputError(
            f"LoRA changes whole matrices, the mask holds {selection.kind} of {name}; locate whole layers"
        )
    if attribute != "weight" or not isinstance(holder, nn.Linear | Conv1D) or shared > 1:
        raise InputError(f"LoRA adapts untied Linear matrices, {name} is none; take it out of the mask")
    return path
