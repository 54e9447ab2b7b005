"""Attribution patching: what every patch would do, to first order, from two forwards and one backward.

The effect of setting a state a to its value in the other run is about (a_other - a_base) * d metric / da, taken in
the base run (Nanda 2023, "Attribution patching"). All sites of all layers and positions come out of one backward
pass. The integrated-gradients variant averages the gradient over points between the two runs' embeddings (Hanna
et al. 2024, arXiv:2403.17806, for edges). A window's estimate is the sum over its layers.

What stands in front of a softmax, single queries and keys, gets the attention fix of AtP*
(`tracing.patching.attention_fix`).

Good for ranking cells, bad for their size where the metric saturates: the probability of a target that the
corruption has made unlikely has next to no gradient, its logarithm has. Therefore estimates of the probability
are made in log-probability and turned back: p_base * exp(estimate), at most 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.hooks import patched, record
from locus.model import Model
from tracing.patching.attention_fix import fixed_effects, needed_for
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs, PatchingQuestion, divergence
from tracing.patching.sites import Kind, PatchedRun, Site, site_module

_GradientSite = tuple[Site, int]


def can_estimate(kind: Kind) -> bool:
    """Whether a kind is a plain patch: what is pinned elsewhere (severed variants) has no first-order estimate."""
    return not kind.startswith("block-no-")


def estimate(
    model: Model,
    question: PatchingQuestion,
    readout: Readout,
    cells: Sequence[PatchedRun],
    *,
    points: int = 1,
    through_logs: bool = True,
    noising: bool = False,
    fix_attention: bool = True,
    batch_tokens: int = 4096,
) -> tuple[Float[Tensor, "cell draw"], Float[Tensor, " draw"]]:
    """First-order estimates of the metric in every cell, for each draw.

    Args:
        model: Left as it is.
        question: The two runs; the gradient is taken in the base run.
        readout: The metric; "rank" has no gradient.
        cells: Patches from the other run; what a cell pins to the base run has no first-order effect.
        points: 1 for the gradient in the base run; more for the mean over as many points between the runs.
        through_logs: Estimate probabilities by way of their logarithm, which saturates less.
        noising: Whether the base run is the clean one.
        fix_attention: Recompute the softmax for queries and keys instead of going through its gradient.
        batch_tokens: Tokens in one forward, at least one draw's.

    Returns:
        The metric as it would be with each cell patched, and as it is in the base run.

    Raises:
        InputError: the metric has no gradient, or one that is zero everywhere in the base run.
    """
    if readout.metric == "rank":
        raise InputError("the rank of a token has no gradient: choose another metric for attribution")
    if readout.metric == "kl" and noising and points == 1:
        raise InputError(
            "the divergence from the clean run has gradient zero in the clean run: with the metric kl, attribution "
            "needs the direction denoise, or points above 1"
        )
    sites = sorted({(p.site, layer) for cell in cells for p in cell.patches for layer in range(*p.layers)})
    logs = through_logs and readout.metric in ("prob", "first_prob")
    if readout.metric == "first_prob":  # nothing of the target's later tokens is read
        question, readout = (
            replace(question, reads=question.reads[:1]),
            replace(readout, labels=readout.labels[:1]),
        )
    target = replace(readout, metric="logprob") if logs else readout
    per_batch = max(1, batch_tokens // question.n_pos)
    found, bases = [], []
    for first in range(0, question.samples, per_batch):
        some = question.draws(slice(first, min(first + per_batch, question.samples)))
        base, products, fixed = _products(model, some, target, sites, points, fix_attention)
        changes = [_change(cell, products, fixed, model.atlas.d_head) for cell in cells]
        change = torch.stack(changes) if changes else base.new_zeros(0, len(base))
        found.append(_out_of_logs(base + change, logs).cpu())
        bases.append(_out_of_logs(base, logs).cpu())
    return torch.cat(found, dim=1), torch.cat(bases)


def _out_of_logs(values: Tensor, logs: bool) -> Tensor:
    return values.clamp(max=0.0).exp() if logs else values


def _change(
    cell: PatchedRun,
    products: Mapping[_GradientSite, Tensor],
    fixed: Mapping[_GradientSite, Tensor],
    d_head: int,
) -> Float[Tensor, " draw"]:
    """Sum of the effects over what the cell patches."""
    parts = []
    for patch in cell.patches:
        for layer in range(*patch.layers):
            here, columns = (patch.site, layer), patch.columns
            effect = products[here]
            if here in fixed:
                effect = fixed[here]
                columns = None if columns is None else tuple(sorted({c // d_head for c in columns}))
            effect = effect[:, list(patch.positions)]
            parts.append((effect if columns is None else effect[..., list(columns)]).sum((-1, -2)).cpu())
    return torch.stack(parts).sum(0)


def _products(
    model: Model,
    question: PatchingQuestion,
    readout: Readout,
    asked: Sequence[_GradientSite],
    points: int,
    fix_attention: bool,
) -> tuple[Float[Tensor, " draw"], dict[_GradientSite, Tensor], dict[_GradientSite, Tensor]]:
    """The metric in the base run; (other - base) * mean gradient of every site, `draw pos width`; and the effect
    behind the softmax of those in front of one, `draw pos head`."""
    samples = question.samples
    sites = sorted(set(asked) | needed_for(asked)) if fix_attention else asked
    other, _, _ = _run(model, question.other, question, readout, sites, gradient=False)
    base, score, gradients = _run(model, question.base, question, readout, sites, gradient=points == 1)
    if points > 1:
        total = {site: torch.zeros_like(base[site]) for site in sites}
        for k in range(points):
            between = _between(model, question, (k + 0.5) / points)
            for site, gradient in _run(model, between, question, readout, sites, gradient=True)[2].items():
                total[site] = total[site] + gradient / points
        gradients = total
    products = {
        site: (_wide(other[site]) - _wide(base[site])) * _wide(gradients[site]).expand(samples, -1, -1)
        for site in sites
    }
    fixed: dict[_GradientSite, Tensor] = {}
    if fix_attention:
        differ = range(divergence(question), question.n_pos)
        fixed = fixed_effects(model, question, asked, base, other, gradients, differ)
    return score.expand(samples), products, fixed


def _run(
    model: Model,
    inputs: Inputs,
    question: PatchingQuestion,
    readout: Readout,
    sites: Sequence[_GradientSite],
    *,
    gradient: bool,
) -> tuple[dict[_GradientSite, Tensor], Tensor, dict[_GradientSite, Tensor]]:
    """Values of the sites, the metric of each draw, and its gradients there if they are asked for."""
    names = {site: site_module(model.atlas, *site) for site in sites}
    outputs = [name for name, side in names.values() if side == "output"]
    entries = [name for name, side in names.values() if side == "input"]
    ids = inputs.ids.to(model.device).expand(inputs.samples, -1)
    reads = list(question.reads)

    def embed(output: Tensor) -> Tensor:
        return inputs.embedded(output).detach().requires_grad_(gradient)

    with (
        torch.set_grad_enabled(gradient),
        record(model.module, outputs, entries, detach=not gradient) as seen,
        patched(model.module, {model.atlas.embed: embed}, {model.atlas.unembed: lambda h: h[:, reads]}),
    ):
        score = readout(model.module(input_ids=ids, use_cache=False).logits)[:, 0]
    values = {
        site: (seen.outputs if side == "output" else seen.inputs)[name]
        for site, (name, side) in names.items()
    }
    gradients: dict[_GradientSite, Tensor] = {}
    if gradient:
        taken = torch.autograd.grad(score.sum(), [values[site] for site in sites], allow_unused=True)
        gradients = {
            site: torch.zeros_like(values[site]) if g is None else g
            for site, g in zip(sites, taken, strict=True)
        }
    return {site: value.detach() for site, value in values.items()}, score.detach(), gradients


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: differences of half-precision states lose most of their digits."""
    return values if values.dtype == torch.float64 else values.float()


@torch.no_grad()
def _between(model: Model, question: PatchingQuestion, alpha: float) -> Inputs:
    """Embeddings a fraction alpha of the way from the base to the other run, at every position."""
    ends = []
    module = model.module.get_submodule(model.atlas.embed)
    for inputs in (question.base, question.other):
        output: Tensor = module(inputs.ids.to(model.device)[None]).expand(inputs.samples, -1, -1)
        ends.append(inputs.embedded(output).expand(question.samples, -1, -1))
    mixed = (1 - alpha) * ends[0].float() + alpha * ends[1].float()
    return Inputs(question.base.ids, tuple(range(question.n_pos)), mixed.to(ends[0].dtype))
