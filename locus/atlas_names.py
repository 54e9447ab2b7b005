"""TransformerLens' architecture adapters, asked for names that exist in one given model.

An adapter is made from the model's configuration alone and only translates: the model is never wrapped.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from locus.atlas import NeuronPart, NeuronRole
from locus.errors import InputError
from locus.parallel.sharding import class_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_UNNAMED = (
    (("expert", "sparsemoe"), "is a mixture of experts: a router chooses whose neurons run"),
    (
        ("mamba", "rwkv", "deltanet", "recurrent", "mixer", "shortconv", "hyena"),
        "is recurrent, not attention",
    ),
)
STILL = "its checkpoints can still be compared, exported and reverted (`locus diff`, `export`, `revert`)"
"""What remains possible with a model whose parts have no exact names."""


class Names:
    """Paths of TransformerLens ("blocks.3.mlp.out") translated into names of one model's modules.

    Raises:
        InputError: TransformerLens has no adapter for the architecture, or the model is not one stack of
            decoder blocks.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.architecture = class_name(module)
        self._adapter = _adapter(module)
        mapping = self._adapter.component_mapping
        if getattr(module.config, "is_encoder_decoder", False) or "blocks" not in mapping:
            raise InputError(f"{self.architecture} is not one stack of decoder blocks; {STILL}")
        self._block = mapping["blocks"]
        self.n_layers = sum(1 for _ in module.get_submodule(self("blocks")).children())
        cfg = self._adapter.cfg
        self.d_model, self.n_heads, self.d_head = int(cfg.d_model), int(cfg.n_heads), int(cfg.d_head)
        self.parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
        # NeoX renamed its head between releases of transformers: the model knows best which module it is.
        head = module.get_output_embeddings()
        paths = [name for name, part in module.named_modules() if part is head]
        self.unembed = paths[0] if paths else self("unembed")

    def __call__(self, path: str) -> str:
        """The module that TransformerLens calls `path`.

        Raises:
            InputError: it has no exact name in this model; says why.
        """
        if (name := self._translate(path)) is None:
            raise InputError(f"{self.architecture}: {path} has no exact name: {self._why(path)}; {STILL}")
        return name

    def block(self, layer: int, part: str = "") -> str:
        """A block, or a part of it."""
        return self(f"blocks.{layer}.{part}".rstrip("."))

    def mlp(self, layer: int) -> str:
        """The MLP's module, or its last projection where the MLP is no module of its own (OPT)."""
        return self._translate(f"blocks.{layer}.mlp") or self.block(layer, "mlp.out")

    def added(self, layer: int, alias: Literal["hook_attn_out", "hook_mlp_out"]) -> str:
        """The module whose output is what attention or MLP adds to the residual stream."""
        target = str(self._block.hook_aliases.get(alias, ""))
        if not target.endswith(".hook_out"):
            block = self.block(layer)
            raise InputError(
                f"{self.architecture}: {alias} has no exact name: {block} rescales it before adding; {STILL}"
            )
        return self.block(layer, target.removesuffix(".hook_out"))

    def n_kv_heads(self) -> int:
        """Key/value heads, counted on the projections' own widths."""
        if (key := self._translate("blocks.0.attn.k")) is not None:
            return self.width(key, "out") // self.d_head
        if (fused := self._translate("blocks.0.attn.qkv")) is not None:
            return (self.width(fused, "out") // self.d_head - self.n_heads) // 2
        return int(getattr(self._adapter.cfg, "n_key_value_heads", None) or self.n_heads)

    def projections(self, part: Literal["q", "k", "v"]) -> tuple[str, ...]:
        """The projections that make queries, keys or values, one per layer; none where they make anything else too."""
        found = [self._translate(f"blocks.{i}.attn.{part}") for i in range(self.n_layers)]
        width = (self.n_heads if part == "q" else self.n_kv_heads()) * self.d_head
        alone = [name for name in found if name is not None and self.width(name, "out") == width]
        return tuple(alone) if len(alone) == self.n_layers else ()

    def neuron_parts(self, layer: int) -> tuple[NeuronPart, ...]:
        """Every tensor that holds a piece of the layer's neurons, gate before up before down."""
        down = self.block(layer, "mlp.out")
        bridge = self._block.submodules["mlp"]
        if (fused := getattr(bridge, "fused_attr", None)) is not None:
            both = f"{self.block(layer, 'mlp')}.{fused}"
            parts = [*self._parts(both, 0, "gate"), *self._parts(both, self.width(down, "in"), "up")]
        else:
            gated = "gate" in bridge.submodules and self._translate(f"blocks.{layer}.mlp.gate") is not None
            parts = self._parts(self.block(layer, "mlp.gate"), 0, "gate") if gated else []
            parts += self._parts(self.block(layer, "mlp.in"), 0, "up")
        return (*parts, NeuronPart(f"{down}.weight", 1 - self._out_axis(down), 0, "down"))

    def width(self, name: str, side: Literal["in", "out"]) -> int:
        """How wide a projection's input or output is.

        Raises:
            InputError: it has no plain weight matrix (quantized, or not a projection).
        """
        weight = getattr(self._module(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in _EDITABLE:
            kind = type(self._module(name)).__name__
            raise InputError(
                f"{self.architecture}: {name} ({kind}) has no plain weight matrix: load the model unquantized"
            )
        axis = self._out_axis(name)
        return weight.shape[axis if side == "out" else 1 - axis]

    def _parts(self, name: str, offset: int, role: Literal["gate", "up"]) -> list[NeuronPart]:
        parts = [NeuronPart(f"{name}.weight", self._out_axis(name), offset, role)]
        if getattr(self._module(name), "bias", None) is not None:
            bias: NeuronRole = "gate_bias" if role == "gate" else "up_bias"
            parts.append(NeuronPart(f"{name}.bias", 0, offset, bias))
        return parts

    def _out_axis(self, name: str) -> int:
        """GPT-2's projections (Conv1D) store `[in, out]`, all others `[out, in]`."""
        from transformers.pytorch_utils import Conv1D

        return 1 if isinstance(self._module(name), Conv1D) else 0

    def _module(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)

    def _translate(self, path: str) -> str | None:
        try:
            name: str = self._adapter.translate_transformer_lens_path(path)
            self._module(name)
        except (ValueError, AttributeError):  # TransformerLens does not know it; this model does not have it
            return None
        return name

    def _why(self, path: str) -> str:
        """What stands where the part should be, in words."""
        block = self._translate(".".join(path.split(".")[:2])) if path.startswith("blocks.") else None
        for where in (block, ""):
            if where is None:
                continue
            kinds = sorted({type(part).__name__ for part in self._module(where).modules()})
            for words, why in _UNNAMED:
                for kind in kinds:
                    if any(word in kind.lower() for word in words):
                        return f"{kind} in {where or 'the model'} {why}"
        if path == "ln_final":
            return "the last block's output does not reach the unembedding through one norm (OPT-350m, GPT-1)"
        return f"{block or 'the model'} has no such module"


def _adapter(module: PreTrainedModel) -> Any:
    """The adapter for a model, made from its configuration."""
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = class_name(module)
    config = build_bridge_config_from_hf(module.config, architecture, architecture, module.dtype)
    try:
        return ArchitectureAdapterFactory.select_architecture_adapter(config)
    except ImportError as error:
        raise InputError(f"{architecture}: {error}") from error
    except ValueError as error:
        if architecture in SUPPORTED_ARCHITECTURES:
            raise
        near = difflib.get_close_matches(architecture, SUPPORTED_ARCHITECTURES, n=3)
        mend = f"; near: {', '.join(near)}" if near else ""
        raise InputError(f"{architecture}: TransformerLens has no adapter for it{mend}; {STILL}") from error
