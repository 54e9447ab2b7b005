"""Fact-lookup MLPs: those that hand the answer to the heads that fetch it (Guo et al. 2024, arXiv:2410.12949).

Two steps of path patching, averaged over facts and draws of a corrupted subject:

1. Attribute-extraction heads: those whose direct share of the target's logit at the last position (`direct`)
   falls most when the subject is corrupted. The `heads` best of the model are kept.
2. For an MLP below them, its output in the clean run, at all positions, is exchanged for its output in the corrupted
   run, but only in what those heads read: the block of each head's layer is run again on the changed residual
   stream, everything between staying clean. Score = the fall of the heads' summed direct shares.

A neuron's score orders by its MLP's score first, then by its own saliency, so that `.top` fills the best layers one
after the other, as whole MLPs with a budget of as many layers' neurons.

Use it before editing whole MLPs: the study found such MLPs to withstand relearning and other question forms better
than those found by their effect on the output. Cost: a clean and `samples` corrupted forwards per fact, twice, so that
one fact's states are held at a time; a block's forward for each layer with heads, layer below it and draw; a
saliency pass.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.errors import InputError
from locus.hooks import Recording, record
from locus.model import Model
from locus.scores import LayerScores, NeuronScores
from tracing.checked_settings import checked_choices
from tracing.localizer import Cost, ExampleLoop, Examples
from tracing.localizers.direct_logit import head_directions
from tracing.localizers.indirect_effect import NeuronCorruption, at_least_one_draw, prepare_all
from tracing.localizers.saliency import GradientSaliency
from tracing.patching.corruption import Corrupter, Prepared
from tracing.patching.plain_engine import logits_of
from tracing.patching.runs import Inputs
from tracing.replay.blocks import (
    CannotReplay,
    Recorded,
    Rows,
    failures_refuse_replay,
    masked_attention,
    record_whole,
)
from tracing.score_algebra import normalize


@dataclass(frozen=True)
@checked_choices
class FactLookup:
    """MLPs by their effect on the heads that extract the attribute."""

    heads: int = 8
    """Attribute-extraction heads that are kept."""
    samples: int = 2
    """Draws of the corruption."""
    corruption: NeuronCorruption = "gaussian"
    """Noise on the subject's embeddings, or another fact's subject in its place."""
    noise: float = 3.0
    """Standard deviation of the noise, in those of the subjects' embeddings."""
    seed: int = 0
    """Of the draws."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """See the module; counts heads in `heads` different layers, halfway up on average."""
        layers = min(self.heads, model.atlas.n_layers)
        blocks = self.samples * layers / 2
        return Cost(len(facts) * (2 * (1 + self.samples) + blocks + 1), len(facts))

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Order neurons by their MLP's score, then by saliency; a retain set is not used.

        Raises:
            InputError: no facts, no samples, more heads than there are, or blocks that cannot be run one by one.
        """
        return by_layer(self.layers(model, facts), model, facts, batch_tokens)

    def layers(self, model: Model, facts: Examples) -> LayerScores:
        """Mean fall of the extraction heads' direct shares, in logits, for each MLP."""
        atlas = model.atlas
        if not 1 <= self.heads <= atlas.n_layers * atlas.n_heads:
            raise InputError(f"heads is {self.heads}: {model.name} has {atlas.n_layers * atlas.n_heads}")
        at_least_one_draw(self.samples)
        prepared = prepare_all(model, facts, self.seed)
        corrupter = Corrupter.of(model, prepared, self.corruption, self.noise)
        loop = ExampleLoop(model, facts, [one.encoded for one in prepared], "its head's share")

        def pair(number: int) -> _Pair:
            one = prepared[number]
            return _Pair.of(model, one, corrupter.inputs(model, one, self.samples))

        def by_head(number: int) -> tuple[Tensor]:
            return (pair(number).head_falls() / len(prepared),)

        def by_mlp(number: int) -> tuple[Tensor]:
            runs, falls = pair(number), torch.zeros(atlas.n_layers)
            for layer in kept.any(1).nonzero().flatten().tolist():
                falls[:layer] += runs.falls_by_mlp(int(layer), kept[int(layer)])
            return (falls / len(prepared),)

        try:
            with masked_attention(model), failures_refuse_replay():
                (falls,) = loop.over_examples(by_head, "extraction heads")
                best = falls.flatten().topk(self.heads).indices
                kept = torch.zeros_like(falls, dtype=torch.bool)
                kept.view(-1)[best] = True
                (total,) = loop.over_examples(by_mlp, "path patching")
        except CannotReplay as reason:
            raise InputError(f"{model.name}: its heads cannot be run again by themselves: {reason}") from None
        return LayerScores(total, "fact-lookup", model.fingerprint, atlas, asdict(self))


def by_layer(layers: LayerScores, model: Model, facts: Examples, batch_tokens: int = 4096) -> NeuronScores:
    """Neuron scores that order by their layer's score first, then by saliency."""
    saliency = GradientSaliency().run(model, facts, batch_tokens=batch_tokens)
    within = normalize(saliency, "rank", per_layer=True).values
    values = layers.values.argsort().argsort()[:, None] + 0.999 * within
    return NeuronScores(values, layers.method, layers.fingerprint, layers.atlas, layers.settings)


@dataclass(frozen=True)
class _Pair:
    """The clean and the corrupted run of one fact."""

    model: Model
    clean: Recorded
    corrupted: Recording
    """Outputs of the MLPs and inputs of the output projections, a row per draw."""
    directions: Float[Tensor, "layer entry"]
    """What one unit of each entry of the heads' outputs adds to the target's logit at the last position."""
    last: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, prepared: Prepared, corrupted: Inputs) -> _Pair:
        ids = torch.tensor(prepared.encoded.prompt_ids)
        last = len(ids) - 1
        sites = (model.atlas.mlp_out, model.atlas.attn_z)
        clean = record_whole(model, Inputs(ids), [last], *sites)
        noisy = Inputs(ids, corrupted.positions, corrupted.embeddings)
        with record(model.module, outputs=sites[0], inputs=sites[1]) as seen:
            logits_of(model, noisy, [last], noisy.samples)
        return cls(model, clean, seen, head_directions(model, prepared.encoded), last)

    def head_falls(self) -> Float[Tensor, "layer head"]:
        """Direct share of each head in the clean run minus its mean in the corrupted one."""
        atlas = self.model.atlas
        falls = []
        for layer, name in enumerate(atlas.attn_z):
            z = self.clean.inputs[name][0, self.last] - self.corrupted.inputs[name][:, self.last].mean(0)
            falls.append((z.float().cpu() * self.directions[layer]).view(atlas.n_heads, -1).sum(1))
        return torch.stack(falls)

    @torch.no_grad()
    def falls_by_mlp(self, layer: int, heads: Tensor) -> Float[Tensor, " below"]:
        """Fall of these heads' direct shares when one MLP below is corrupted in what they read."""
        atlas = self.model.atlas
        stream = self.clean.hidden[layer]
        weights = self.directions[layer].view(atlas.n_heads, -1) * heads[:, None]
        clean = self.clean.inputs[atlas.attn_z[layer]][0, self.last].float().cpu()
        falls = []
        for below in range(layer):
            name = atlas.mlp_out[below]
            change = self.corrupted.outputs[name] - self.clean.outputs[name]
            changed = stream + change.to(stream.device)
            rows = _all_rows(stream.shape[1], len(changed), stream.device)
            with record(self.model.module, inputs=[atlas.attn_z[layer]]) as seen:
                self.clean.blocks(layer, changed, rows, ())
            z = seen.inputs[atlas.attn_z[layer]][:, self.last].float().mean(0).cpu()
            falls.append(((clean - z).view(atlas.n_heads, -1) * weights).sum())
        return torch.stack(falls) if falls else torch.zeros(0)


def _all_rows(n_pos: int, batch: int, device: torch.device) -> Rows:
    """All positions of a batch of whole prompts."""
    positions: Int[Tensor, "1 pos"] = torch.arange(n_pos, device=device)[None]
    visible = torch.ones(1, n_pos, n_pos, dtype=torch.bool, device=device)
    return Rows(positions, positions, visible, batch)
