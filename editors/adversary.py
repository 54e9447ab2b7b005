"""A latent adversary inside each step: forget even when a hidden state is pushed back towards the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.forward import Batch, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model


@dataclass(frozen=True)
class LatentAttack:
    """Targeted latent adversarial training (Sheshadri et al. 2024, arXiv:2407.15549), for any objective."""

    steps: int = 0
    """Steps of the inner attack; 0 for none, 16 in the paper."""
    epsilon: float = 2.0
    """Largest norm of the perturbation at each position."""
    lr: float = 0.05
    """Step of the inner attack, in the same units."""
    layer: int = -1
    """Block whose output is perturbed; -1 for the one at a third of the depth."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.epsilon <= 0 or self.lr <= 0:
            raise InputError("attack: steps must not be negative, epsilon and lr must be positive")

    @contextlib.contextmanager
    def applied(self, model: Model, batch: Batch) -> Iterator[None]:
        """Find the perturbation that makes the targets likeliest, and keep it on inside the block."""
        if not self.steps:
            yield
            return
        n_layers = model.atlas.n_layers
        if self.layer >= n_layers:
            raise InputError(f"attack layer {self.layer}: the model has layers 0 to {n_layers - 1}")
        block = model.atlas.blocks[n_layers // 3 if self.layer < 0 else self.layer]
        delta = self._strongest(model, batch.to(model.device), block)
        with patched(model.module, outputs={block: _adding(delta)}):
            yield

    def _strongest(self, model: Model, batch: Batch, block: str) -> Float[Tensor, "batch pos d_model"]:
        """Normalised gradient steps down the targets' NLL, projected to the ball, on real positions only."""
        real = batch.attention_mask[..., None]
        delta = torch.zeros(*batch.ids.shape, model.atlas.d_model, device=batch.ids.device)
        for _ in range(self.steps):
            delta.requires_grad_(True)
            with patched(model.module, outputs={block: _adding(delta)}):
                nll = label_nll(label_logits(model, batch), batch).sum()
            (gradient,) = torch.autograd.grad(nll, delta)
            step = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            delta = project((delta.detach() - self.lr * step) * real, self.epsilon)
        return delta.detach()


def _adding(delta: Tensor) -> Callable[[Tensor], Tensor]:
    """What adds `delta` to a hidden state, in the state's own dtype."""
    return lambda hidden: hidden + delta.to(hidden)


def project(delta: Float[Tensor, "*batch d_model"], epsilon: float) -> Float[Tensor, "*batch d_model"]:
    """Shorten every vector that is longer than `epsilon` to that length."""
    norm = delta.norm(dim=-1, keepdim=True)
    shortened: Tensor = delta * (epsilon / norm.clamp(min=epsilon))
    return shortened
