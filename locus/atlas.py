"""Where everything is: module and parameter names of a model's blocks, attention, MLPs and neurons.

The only file that knows architectures. Names come from TransformerLens' architecture adapters, which translate
its vocabulary into module paths without touching the model; each name is then checked against the very model
it describes, its shape included, and one forward of a few tokens checks that what each block adds to the
residual stream is exactly what the atlas says (block output = block input + attention + MLP). What cannot be
named exactly is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from locus.errors import InputError
from locus.hooks import patched, record, stop_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["gate", "gate_bias", "up", "up_bias", "down"]
Site = Literal["block_in", "block_out", "attn_out", "mlp_out", "attn_z", "neuron"]

_HOOK_NAMES: Mapping[str, str] = {
    "block_in": "hook_resid_pre",
    "block_out": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "attn_z": "attn.hook_z",
    "neuron": "mlp.hook_post",
}


@dataclass(frozen=True)
class NeuronPart:
    """One tensor that holds a row, a column or an entry of every neuron of a layer.

    Neuron i's part is `param.select(axis, offset + i)`.
    """

    param: str
    """Parameter name, as in `named_parameters()`."""
    axis: int
    """Dimension of the parameter that runs over neurons."""
    offset: int
    """Index of neuron 0 (fused projections hold gate and up behind each other)."""
    role: Role
    """gate: the projection that goes through the activation function where there are two; up: the other one,
    or the only one; down: the column written to the residual stream. The output bias is nobody's."""


@dataclass(frozen=True)
class Atlas:
    """Names of a decoder's parts. Every tuple has one entry a layer."""

    architecture: str
    """Class of the model, "LlamaForCausalLM"."""
    n_layers: int
    d_model: int
    d_mlp: int
    """Neurons a layer."""
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    """Rows of the unembedding; some models pad them beyond the tokenizer's vocabulary."""
    parallel: bool
    """Whether attention and MLP of a block both read the block's input (GPT-J, Falcon, Phi, most NeoX)."""
    embed: str
    """Module that turns token ids into vectors."""
    final_norm: str
    unembed: str
    blocks: tuple[str, ...]
    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    """The MLP's module; OPT has none, there it is the last projection, whose output is the MLP's."""
    attn_out: tuple[str, ...]
    """Module whose output is exactly what attention adds to the residual stream (Gemma-2, OLMo-2: a norm)."""
    mlp_out: tuple[str, ...]
    """Module whose output is exactly what the MLP adds to the residual stream."""
    attn_z: tuple[str, ...]
    """Module whose input is the heads' outputs side by side, `batch pos n_heads*d_head`, head 0 first."""
    neuron_in: tuple[str, ...]
    """Module whose input is the neurons' activations, `batch pos d_mlp`."""
    neurons: tuple[tuple[NeuronPart, ...], ...]
    """The parts of a layer's neurons, gate before up before down, a bias behind its weight."""

    def hook_name(self, site: Site, layer: int) -> str:
        """TransformerLens' name of a site: "blocks.3.hook_mlp_out"."""
        if site not in _HOOK_NAMES:
            raise InputError(f'no site is called "{site}"; there are {", ".join(_HOOK_NAMES)}')
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer {layer} of {self.architecture}: it has layers 0 to {self.n_layers - 1}")
        return f"blocks.{layer}.{_HOOK_NAMES[site]}"

    def to_json(self) -> dict[str, Any]:
        """Strings, ints, lists and dicts only; `Atlas.from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Atlas:
        """The atlas that `to_json` wrote.

        Raises:
            InputError: a field is missing or unknown.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if wrong := known ^ set(obj):
            raise InputError(f"not an atlas: field {', '.join(sorted(wrong))} is missing or unknown")
        neurons = tuple(tuple(NeuronPart(**part) for part in layer) for layer in obj["neurons"])
        rest = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in obj.items() if k != "neurons"}
        return cls(**rest, neurons=neurons)


def read_atlas(module: PreTrainedModel) -> Atlas:
    """Name the parts of a causal language model, and check every name.

    Args:
        module: A plain transformers model; it is read, run on four tokens, and left as it was.

    Raises:
        InputError: TransformerLens has no adapter for the architecture, or a part of it has no exact name
            (a mixture's experts, recurrent blocks, post-norm residuals, scaled residuals); says which.
    """
    names = _Names(module)
    layers = range(names.n_layers)
    atlas = Atlas(
        architecture=names.architecture,
        n_layers=names.n_layers,
        d_model=names.cfg.d_model,
        d_mlp=_neuron_count(names),
        n_heads=names.cfg.n_heads,
        n_kv_heads=getattr(names.cfg, "n_key_value_heads", None) or names.cfg.n_heads,
        d_head=names.cfg.d_head,
        d_vocab=_width(module, names.unembed, "out"),
        parallel=bool(getattr(names.cfg, "parallel_attn_mlp", False)),
        embed=names("embed"),
        final_norm=names("ln_final"),
        unembed=names.unembed,
        blocks=tuple(names.block(i) for i in layers),
        attn=tuple(names.block(i, "attn") for i in layers),
        mlp=tuple(names.mlp(i) for i in layers),
        attn_out=tuple(names.hooked(i, "hook_attn_out") for i in layers),
        mlp_out=tuple(names.hooked(i, "hook_mlp_out") for i in layers),
        attn_z=tuple(names.block(i, "attn.o") for i in layers),
        neuron_in=tuple(names.block(i, "mlp.out") for i in layers),
        neurons=tuple(_neuron_parts(names, i) for i in layers),
    )
    _check_shapes(module, atlas)
    parallel = _check_residuals(module, atlas)
    return atlas if parallel is None else dataclasses.replace(atlas, parallel=parallel)


class _Names:
    """TransformerLens' paths translated into names that exist in one model."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.architecture = type(module).__name__
        self.adapter = _adapter(module)
        self.cfg = self.adapter.cfg
        mapping = self.adapter.component_mapping
        if getattr(module.config, "is_encoder_decoder", False) or "blocks" not in mapping:
            raise self.refusal("its blocks", "it is not a single stack of decoder blocks")
        self._block = mapping["blocks"]
        self.n_layers = len(module.get_submodule(self("blocks")))  # type: ignore[arg-type]
        # NeoX renamed its head between releases: the model itself knows best which module it is.
        head = module.get_output_embeddings()
        paths = [name for name, part in module.named_modules() if part is head]
        self.unembed = paths[0] if paths else self("unembed")

    def __call__(self, path: str) -> str:
        """The module that TransformerLens calls `path`, or an InputError that says it has no exact name."""
        try:
            name: str = self.adapter.translate_transformer_lens_path(path)
            self.module.get_submodule(name)
        except (ValueError, AttributeError):
            raise self.refusal(path, self._why(path)) from None
        return name

    def has(self, path: str) -> bool:
        """Whether `path` has a name here."""
        try:
            self(path)
        except InputError:
            return False
        return True

    def block(self, layer: int, part: str = "") -> str:
        """A block, or a part of it."""
        return self(f"blocks.{layer}.{part}".rstrip("."))

    def mlp(self, layer: int) -> str:
        """The MLP's module, or its last projection where the MLP is no module."""
        return self.block(layer, "mlp" if self.has(f"blocks.{layer}.mlp") else "mlp.out")

    def hooked(self, layer: int, alias: str) -> str:
        """The module whose output TransformerLens' block calls `alias`."""
        target = self._block.hook_aliases.get(alias, "")
        return self.block(layer, target.removesuffix(".hook_out"))

    def fused(self, layer: int, part: str) -> tuple[str, int, int] | None:
        """(parameter, index, of how many) where `part` is one slice of a fused projection."""
        rule = (self.adapter.weight_processing_conversions or {}).get(f"blocks.{{i}}.{part}")
        how = getattr(rule, "tensor_conversion", None)
        if getattr(rule, "source_key", None) is None or not hasattr(how, "num_splits"):
            return None
        return rule.source_key.replace("{i}", str(layer)), how.index, how.num_splits

    def refusal(self, part: str, why: str) -> InputError:
        """The error for a part that cannot be named exactly."""
        return InputError(
            f"{self.architecture}: {part} has no exact name: {why}. Its checkpoints can still be compared with "
            "`locus diff`; to trace or edit, take a model with dense attention-and-MLP blocks (`locus models`)"
        )

    def _why(self, path: str) -> str:
        parts = path.split(".")
        if parts[0] != "blocks" or len(parts) < 2:
            return "the model has no such module"
        name = self.adapter.translate_transformer_lens_path(".".join(parts[:2]))
        inside = {type(m).__name__ for m in self.module.get_submodule(name).modules()}
        for words, why in _INEXACT:
            if found := sorted(kind for kind in inside if any(word in kind.lower() for word in words)):
                return f"{why} ({found[0]} in {name})"
        return f"{name} has no such module"


_INEXACT = (
    (
        ("expert", "moe", "sparse"),
        "a mixture of experts, where a neuron belongs to an expert and a router decides",
    ),
    (("mamba", "rwkv", "deltanet", "recurrent", "mixer", "ssm", "conv"), "a recurrent block, not attention"),
)


def _adapter(module: PreTrainedModel) -> Any:
    """TransformerLens' adapter for the model, made from its configuration alone."""
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    architecture = type(module).__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        near = difflib.get_close_matches(architecture, SUPPORTED_ARCHITECTURES, n=3)
        raise InputError(
            f"{architecture}: TransformerLens has no adapter for this architecture"
            + (f"; it has {', '.join(near)}" if near else "")
        )
    config = build_bridge_config_from_hf(module.config, architecture, architecture, module.dtype)
    return ArchitectureAdapterFactory.select_architecture_adapter(config)


def _neuron_count(names: _Names) -> int:
    return _width(names.module, names.block(0, "mlp.out"), "in")


def _neuron_parts(names: _Names, layer: int) -> tuple[NeuronPart, ...]:
    """Every tensor that holds a piece of the layer's neurons."""
    parts: list[NeuronPart] = []
    d_mlp = _neuron_count(names)
    gated = names.has(f"blocks.{layer}.mlp.gate") or names.fused(layer, "mlp.gate") is not None
    for role, path in (("gate", "mlp.gate"), ("up", "mlp.in"))[not gated :]:
        if names.has(f"blocks.{layer}.{path}"):
            name, offset = names.block(layer, path), 0
        elif (fused := names.fused(layer, path)) is not None:
            param, index, _ = fused
            name, offset = param.removesuffix(".weight"), index * d_mlp
        else:
            name, offset = names.block(layer, path), 0  # raises, naming the part
        projection = names.module.get_submodule(name)
        parts.append(NeuronPart(f"{name}.weight", 1 if _is_conv1d(projection) else 0, offset, role))
        if getattr(projection, "bias", None) is not None:
            parts.append(NeuronPart(f"{name}.bias", 0, offset, f"{role}_bias"))
    down = names.block(layer, "mlp.out")
    axis = 0 if _is_conv1d(names.module.get_submodule(down)) else 1
    return (*parts, NeuronPart(f"{down}.weight", axis, 0, "down"))


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's projections store `[in, out]`, all others `[out, in]`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _width(module: nn.Module, name: str, side: Literal["in", "out"]) -> int:
    """How wide a projection's input or output is."""
    projection = module.get_submodule(name)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise InputError(
            f"{name} ({type(projection).__name__}) has no plain weight matrix; quantized? Load it in full"
        )
    return weight.shape[_is_conv1d(projection) ^ (side == "in")]


def _check_shapes(module: PreTrainedModel, atlas: Atlas) -> None:
    """Every projection and every neuron part is as large as the atlas says."""
    expected = [(atlas.unembed, "in", atlas.d_model)]
    for layer in range(atlas.n_layers):
        expected += [
            (atlas.attn_z[layer], "in", atlas.n_heads * atlas.d_head),
            (atlas.attn_z[layer], "out", atlas.d_model),
            (atlas.neuron_in[layer], "in", atlas.d_mlp),
            (atlas.neuron_in[layer], "out", atlas.d_model),
        ]
    for name, side, width in expected:
        if (found := _width(module, name, side)) != width:
            raise InputError(
                f"{atlas.architecture}: {name} is {found} wide ({side}), expected {width}; "
                "layers of different widths, projected embeddings and quantized weights have no exact names"
            )
    fused = {part.param for parts in atlas.neurons for part in parts if part.offset}
    for layer, parts in enumerate(atlas.neurons):
        for part in parts:
            shape = tuple(module.get_parameter(part.param).shape)
            rows = atlas.d_mlp * (2 if part.param in fused else 1)
            wanted = (rows,) if len(shape) == 1 else (rows, atlas.d_model)[:: -1 if part.axis else 1]
            if shape != wanted:
                raise InputError(
                    f"{atlas.architecture}: {part.param} of layer {layer} has shape {shape}, expected {wanted}"
                )


def _check_residuals(module: PreTrainedModel, atlas: Atlas) -> bool | None:
    """Run four tokens: does each block add exactly what the atlas says, and is it parallel?

    Returns:
        Whether the MLP of block 0 ignores block 0's attention; None where nothing can be run (meta device).
    """
    embed = module.get_submodule(atlas.embed)
    weight = embed.weight
    if weight.is_meta and not hasattr(module, "hf_device_map"):
        return None
    device = "cpu" if weight.is_meta else weight.device
    ids = (torch.arange(4, device=device)[None] * 7 + 5) % weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    added = [*atlas.attn_out, *atlas.mlp_out]
    last = atlas.blocks[-1]
    with torch.no_grad(), _evaluating(module):
        with record(module, [*atlas.blocks, *added], atlas.blocks) as seen, stop_after(module, last):
            module(**inputs)
        for layer, (block, attn, mlp) in enumerate(
            zip(atlas.blocks, atlas.attn_out, atlas.mlp_out, strict=True)
        ):
            terms = (seen.inputs[block], seen.outputs[attn], seen.outputs[mlp])
            _check_sum(atlas, layer, seen.outputs[block], terms)
        attn, mlp = atlas.attn_out[0], atlas.mlp_out[0]
        with (
            patched(module, {attn: torch.zeros_like}),
            record(module, [mlp]) as without,
            stop_after(module, atlas.blocks[0]),
        ):
            module(**inputs)
    return torch.equal(without.outputs[mlp], seen.outputs[mlp])


def _check_sum(atlas: Atlas, layer: int, total: Tensor, terms: tuple[Tensor, ...]) -> None:
    """The terms add up to `total` within the rounding of three additions."""
    size = sum(term.float().abs() for term in terms)
    error = (total.float() - sum(term.float() for term in terms)).abs()
    if not torch.isfinite(error).all():
        raise InputError(
            f"{atlas.architecture}: layer {layer} ({atlas.blocks[layer]}) computes NaN or infinity on plain input; "
            f"damaged weights, or a range too small for {total.dtype} (try another dtype)"
        )
    if (error > 4 * torch.finfo(total.dtype).eps * size).any():
        raise InputError(
            f"{atlas.architecture}: the output of {atlas.blocks[layer]} is not its input + {atlas.attn_out[layer]} + "
            f"{atlas.mlp_out[layer]} (scaled, normalized or differently routed residual stream): attention and MLP "
            "outputs have no exact name. Its checkpoints can still be compared with `locus diff`"
        )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's mode is put back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
