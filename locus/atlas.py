"""Where everything is: module and parameter names of a model's blocks, attention, MLPs and neurons.

Whoever needs a part of a model asks its atlas; nothing else knows architectures. `atlas_reader.read_atlas` draws it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from locus.errors import InputError
from locus.files.schema import built

NeuronRole = Literal["gate", "gate_bias", "up", "up_bias", "down"]
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "mlp_post"]

_HOOK_NAMES: Mapping[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "mlp_post": "mlp.hook_post",
}


OLD_SITES: Mapping[str, str] = {
    "block_in": "resid_pre",
    "block_mid": "resid_mid",
    "block_out": "resid_post",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_z": "z",
    "neuron": "mlp_post",
}
"""Name of a site in the release before -> TransformerLens' name; read from files and options for one release."""


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
    role: NeuronRole
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
    """Neurons per layer."""
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
    attn_q: tuple[str, ...] = ()
    """Module whose output is the heads' queries side by side, before norm and rotation; empty where queries, keys
    and values come out of one projection (GPT-2, NeoX, Falcon, Phi-3)."""
    attn_k: tuple[str, ...] = ()
    """The same of the keys, `n_kv_heads * d_head`."""
    attn_v: tuple[str, ...] = ()
    """The same of the values."""

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
            InputError: a field is missing, unknown or of another type, the layers are not as many as it says, or
                neurons stand where no projection has them.
        """
        atlas = built(cls, obj)
        for name in ("blocks", "attn", "mlp", "attn_out", "mlp_out", "attn_z", "neuron_in", "neurons"):
            if len(getattr(atlas, name)) != atlas.n_layers:
                raise InputError(f"not an atlas: {name} has not {atlas.n_layers} layers")
        for name in ("attn_q", "attn_k", "attn_v"):
            if len(getattr(atlas, name)) not in (0, atlas.n_layers):
                raise InputError(f"not an atlas: {name} has neither {atlas.n_layers} layers nor none")
        axes: dict[str, int] = {}
        for part in (part for layer in atlas.neurons for part in layer):
            only = (0,) if part.role.endswith("_bias") else (0, 1)
            # Fused projections hold one kind of part behind the other.
            if part.axis not in only or part.offset not in (0, atlas.d_mlp):
                raise InputError(f"not an atlas: {part.param} has no neurons at {part.axis}, {part.offset}")
            if axes.setdefault(part.param, part.axis) != part.axis:
                raise InputError(f"not an atlas: {part.param} has neurons on both axes")
        return atlas
