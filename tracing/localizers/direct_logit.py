"""Direct logit attribution: what each part of the model adds to the target's logit at the last position.

The residual stream at the end is a sum: the embedding, and what each attention and MLP added. Behind the final norm,
its scale held at what it is in this run, the target's logit above the mean logit is linear in that sum, so every part
has its share (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"); a head's and a neuron's
follow from their slices of the output and down projections, with a post norm's scale held in the same way
(Gemma-2, OLMo-2). Shares of all layers, the embedding and the constant add up to the logit, exactly.

Use it to see who speaks at the end; it does not show who found the answer: a part that works through later ones has
no share. `locus lens --attribution` writes the shares of layers, heads and neurons. Cost: one forward per fact.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locus.hooks import record
from locus.model import Model
from locus.scores import NeuronScores
from locus.tokens import Encoded
from locus.weight_source import held
from tracing.localizer import Cost, ExampleLoop, Examples


@dataclass(frozen=True)
class DirectAttribution:
    """Shares of the first target token's logit, above the mean over the vocabulary, before any soft-cap."""

    attn: Float[Tensor, " layer"]
    """What each attention added."""
    mlp: Float[Tensor, " layer"]
    """What each MLP added."""
    head: Float[Tensor, "layer head"]
    """Of that, each head's; the rest is the output bias."""
    neuron: Float[Tensor, "layer neuron"]
    """Of the MLP's, each neuron's; the rest is the output bias."""
    embed: float
    """What stood in the stream before the first block."""
    constant: float
    """Biases of the final norm and the unembedding."""

    @property
    def logit(self) -> float:
        """The sum of all shares."""
        return float(self.attn.sum() + self.mlp.sum()) + self.embed + self.constant


@dataclass(frozen=True)
class _Linear:
    """A norm with its scale held: x -> ratio * (x - mean(x) if centred) + bias."""

    ratio: Float[Tensor, " d_model"]
    centred: bool
    bias: Float[Tensor, " d_model"]

    @classmethod
    def of(cls, model: Model, name: str, x: Float[Tensor, " d_model"]) -> _Linear:
        """At this state; read off the norm's own output, so its epsilon and any (1 + weight) are in it."""
        norm = model.module.get_submodule(name)
        has_bias = isinstance(getattr(norm, "bias", None), Tensor)
        bias = held(model, f"{name}.bias").float().to(x.device) if has_bias else torch.zeros_like(x).float()
        weight = next(norm.parameters(), x)
        there = x if weight.is_meta else x.to(weight.device)
        out = norm(there[None])[0].float().to(x.device) - bias
        centred = _centres(norm, there, out + bias)
        entered = x.float() - x.float().mean() if centred else x.float()
        return cls(torch.where(entered == 0, torch.zeros_like(out), out / entered), centred, bias)

    def back(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """The direction before the norm whose dot product with x is the given one's with the norm of x, bias apart."""
        before = self.ratio * direction
        return before - before.mean() if self.centred else before


def _centres(norm: nn.Module, x: Float[Tensor, " d_model"], out: Float[Tensor, " d_model"]) -> bool:
    """Whether a norm subtracts the mean: whether it gives the same when a constant is added to its input.

    Asked of the module itself: Cohere's and OLMo's norms centre, and are no `nn.LayerNorm`.
    """
    shift = 2 * x.float().square().mean().sqrt()
    moved = norm((x.float() + shift).to(x.dtype)[None])[0].float().to(out.device)
    return float((moved - out).norm()) < 0.1 * float(out.norm())


@torch.no_grad()
def head_directions(model: Model, encoded: Encoded) -> Float[Tensor, "layer entry"]:
    """What one unit of each entry of the heads' outputs z adds to the first target token's logit, on the CPU."""
    ends, _ = _record_ends(model, encoded)
    direction, _ = _final_direction(model, encoded, ends)
    atlas = model.atlas
    places = zip(atlas.attn_z, atlas.attn_out, strict=True)
    return torch.stack([_through(model, z, out, ends, direction).cpu() for z, out in places])


def _record_ends(model: Model, encoded: Encoded) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of the modules that matter, at the prompt's last position."""
    atlas = model.atlas
    outputs = [*atlas.attn_out, *atlas.mlp_out]
    inputs = [atlas.blocks[0], *atlas.neuron_in, *atlas.attn_z, *_post_norms(model), atlas.final_norm]
    with record(model.module, outputs=outputs, inputs=inputs) as seen:
        ids = torch.tensor([encoded.prompt_ids], device=model.device)
        model.module(input_ids=ids, use_cache=False)
    # On one device: of a model on several, every layer's are its own's.
    entered = {name: tensor[0, -1].to(model.device) for name, tensor in seen.inputs.items()}
    return entered, {name: tensor[0, -1].to(model.device) for name, tensor in seen.outputs.items()}


def _final_direction(
    model: Model, encoded: Encoded, ends: dict[str, Tensor]
) -> tuple[Float[Tensor, " d_model"], float]:
    """Direction of the residual stream that is the target's logit above the mean, and the constant beside it."""
    head = model.module.get_submodule(model.atlas.unembed)
    norm = _Linear.of(model, model.atlas.final_norm, ends[model.atlas.final_norm])
    unembedding = held(model, f"{model.atlas.unembed}.weight").float().to(norm.ratio.device)
    wanted = unembedding[encoded.target_ids[0]] - unembedding.mean(0)
    constant = float(norm.bias @ wanted)
    if getattr(head, "bias", None) is not None:
        bias = held(model, f"{model.atlas.unembed}.bias")
        constant += float(bias[encoded.target_ids[0]] - bias.mean())
    return norm.back(wanted), constant


@torch.no_grad()
def direct_attribution(model: Model, encoded: Encoded) -> DirectAttribution:
    """Run the prompt once and share out the logit of the first target token at its last position."""
    atlas = model.atlas
    ends, added = _record_ends(model, encoded)
    direction, constant = _final_direction(model, encoded, ends)
    attn, mlp = torch.zeros(atlas.n_layers), torch.zeros(atlas.n_layers)
    heads, neurons = torch.zeros(atlas.n_layers, atlas.n_heads), torch.zeros(atlas.n_layers, atlas.d_mlp)
    for layer in range(atlas.n_layers):
        attn[layer] = added[atlas.attn_out[layer]].float() @ direction
        mlp[layer] = added[atlas.mlp_out[layer]].float() @ direction
        z, h = ends[atlas.attn_z[layer]].float(), ends[atlas.neuron_in[layer]].float()
        by_entry = z * _through(model, atlas.attn_z[layer], atlas.attn_out[layer], ends, direction)
        heads[layer] = by_entry.view(atlas.n_heads, -1).sum(1)
        neurons[layer] = h * _through(model, atlas.neuron_in[layer], atlas.mlp_out[layer], ends, direction)
    embed = float(ends[atlas.blocks[0]].float() @ direction)
    return DirectAttribution(attn, mlp, heads, neurons, embed, constant)


def _post_norms(model: Model) -> list[str]:
    """Modules between an output projection and the residual stream."""
    atlas = model.atlas
    pairs = [*zip(atlas.attn_out, atlas.attn, strict=True), *zip(atlas.mlp_out, atlas.mlp, strict=True)]
    projections = {*atlas.attn_z, *atlas.neuron_in}
    return [out for out, whole in pairs if out != whole and out not in projections]


def _through(
    model: Model, projection: str, out: str, ends: dict[str, Tensor], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, " entry"]:
    """What one unit of each entry of a projection's input adds along a direction of the residual stream."""
    module = model.module.get_submodule(projection)
    if out in ends and out != projection:
        direction = _Linear.of(model, out, ends[out]).back(direction.to(ends[out].device))
    weight = held(model, f"{projection}.weight").float().to(direction.device)
    columns = weight.T if isinstance(module, nn.Linear) else weight  # transformers' Conv1D is [in, out]
    result: Tensor = columns @ direction
    return result


@dataclass(frozen=True)
class DirectLogit:
    """Each neuron's direct share of the target's logit: who speaks at the end."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward per fact."""
        return Cost(len(facts), 0)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Mean share over facts, of the first target token; a retain set is not used.

        Raises:
            InputError: no facts.
        """
        loop = ExampleLoop.of(model, facts, "its share of the logit")
        encoded = loop.encoded

        def of_fact(number: int) -> tuple[Tensor]:
            return (direct_attribution(model, encoded[number]).neuron / len(encoded),)

        (total,) = loop.over_examples(of_fact, "direct attribution")
        return NeuronScores(total, "direct-logit", model.fingerprint, model.atlas, asdict(self))
