"""What the final residual must become for a target not to be said: the model's own answer without the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locus.lens import lens_logits
from locus.model import Model

ROWS = 64
"""States in one pass through the unembedding."""


def suppressing_deltas(
    model: Model,
    hidden: Float[Tensor, "place d_model"],
    banned: Sequence[Sequence[int]],
    goal: float,
    step: float,
    steps: int,
) -> Float[Tensor, "place d_model"]:
    """Small changes of final residual states after which the banned tokens have less probability than `goal`.

    With p the distribution that a state gives and p̄ the same without the banned tokens, renormalized, each delta
    follows the normalized gradient of KL(p̄ ‖ p) until p(banned) < goal: p̄ is what the model would say if it did not
    know, neither a refusal nor a uniform guess. Where `steps` do not get there, the delta is the best of those tried.
    A state whose banned tokens have less than `goal` stays as it is.

    Args:
        model: Its final norm and unembedding are used.
        hidden: What the final norm reads.
        banned: Token ids for each state.
        goal: Probability, > 0.
        step: Length of a step, as a share of the state's norm.
        steps: At most so many.

    Returns:
        The deltas, float64 on the CPU; 0 where nothing was to be done.
    """
    found = [
        _deltas(model, hidden[at : at + ROWS], banned[at : at + ROWS], goal, step, steps)
        for at in range(0, len(hidden), ROWS)
    ]
    return torch.cat(found) if found else torch.zeros(hidden.shape, dtype=torch.float64)


@torch.enable_grad()
def _deltas(
    model: Model,
    hidden: Float[Tensor, "place d_model"],
    banned: Sequence[Sequence[int]],
    goal: float,
    step: float,
    steps: int,
) -> Float[Tensor, "place d_model"]:
    """`suppressing_deltas` of a few states."""
    start = hidden.to(model.device, model.dtype)
    with torch.no_grad():
        logits = lens_logits(model, start)
        forbidden = torch.zeros_like(logits, dtype=torch.bool)
        for row, ids in enumerate(banned):
            forbidden[row, list(ids)] = True
        censored = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
        wanted = censored.exp()
    length = step * start.norm(dim=-1, keepdim=True)
    delta = torch.zeros_like(start)
    best, least = delta.clone(), torch.full((len(start),), torch.inf, device=logits.device)
    for number in range(steps + 1):
        delta.requires_grad_()
        logprobs = lens_logits(model, start + delta).log_softmax(-1)
        mass = (logprobs.detach().exp() * forbidden).sum(-1)
        better = mass < least
        best[better], least[better] = delta.detach()[better], mass[better]
        live = mass > goal
        if number == steps or not bool(live.any()):
            break
        # The entropy of p̄ does not depend on delta; 0 · -inf at the banned tokens is left out.
        divergence = -(wanted * logprobs).sum()
        (slope,) = torch.autograd.grad(divergence, delta)
        with torch.no_grad():
            unit = slope / slope.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
            delta = delta - length.to(delta) * unit * live[:, None].to(delta.device)
    return best.double().cpu()
