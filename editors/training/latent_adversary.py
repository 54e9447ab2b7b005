"""Latent adversarial training: forget even when a hidden state is pushed back towards the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.errors import InputError
from locus.forward import Batch, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model


@dataclass(frozen=True)
class LatentAttack:
    """Targeted latent adversarial training (Sheshadri et al. 2024, arXiv:2407.15549), for any objective."""

    steps: int = 0
    """Steps of the inner attack; 0 for no attack, 16 in the paper."""
    epsilon: float = 2.0
    """Maximum norm of the perturbation at each position."""
    lr: float = 0.05
    """Step size of the inner attack, in the units of epsilon."""
    layer: int = -1
    """Block whose output is perturbed; -1 for the one at a third of the depth."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.epsilon <= 0 or self.lr <= 0:
            raise InputError("attack: steps must not be negative, epsilon and lr must be positive")

    def worst_perturbation(self, model: Model, batch: Batch) -> Perturbation:
        """The perturbation that makes the targets of a batch likeliest.

        Raises:
            InputError: the model has no such layer.
        """
        n_layers = model.atlas.n_layers
        if self.layer >= n_layers:
            raise InputError(f"attack layer {self.layer}: the model has layers 0 to {n_layers - 1}")
        block = model.atlas.blocks[n_layers // 3 if self.layer < 0 else self.layer]
        batch = batch.to(model.device)
        return Perturbation(block, self._strongest(model, batch, block), _prompt_lengths(batch))

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


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What an adversary adds to one block's output, for the examples of one batch."""

    block: str
    """Path of the block."""
    delta: Float[Tensor, "batch pos d_model"]
    """What is added to its output."""
    prompt_lengths: Int[Tensor, " batch"]
    """Positions of each example that another answer to the same prompt shares."""

    @contextlib.contextmanager
    def on(self, model: Model) -> Iterator[None]:
        """Keep the perturbation on inside the block, in which the edited model reads this batch.

        Raises:
            InputError: the forward ended below the perturbed block, which so changed nothing.
        """
        reached = False

        def add(hidden: Tensor) -> Tensor:
            nonlocal reached
            reached = True
            return hidden + self.delta.to(hidden)

        with patched(model.module, outputs={self.block: add}):
            yield
        if not reached:
            raise InputError(
                f"the attack perturbs {self.block}, above the layers that this objective runs: name a lower one "
                "with --attack-layer"
            )

    def on_prompts(self, width: int) -> Perturbation:
        """The perturbation of the prompts alone, for other answers to them in rows of `width` positions."""
        shared = min(width, self.delta.shape[1])
        moved = self.delta.new_zeros(len(self.delta), width, self.delta.shape[2])
        moved[:, :shared] = self.delta[:, :shared]
        prompt = torch.arange(width, device=moved.device) < self.prompt_lengths[:, None]
        return Perturbation(self.block, moved * prompt[..., None], self.prompt_lengths)


def _prompt_lengths(batch: Batch) -> Int[Tensor, " batch"]:
    """Positions before each example's first target token."""
    lengths = torch.full((len(batch.examples),), batch.ids.shape[1], device=batch.cols.device)
    return lengths.scatter_reduce(0, batch.rows, batch.cols + 1, "amin")


def _adding(delta: Tensor) -> Callable[[Tensor], Tensor]:
    """What adds `delta` to a hidden state, in the state's own dtype."""
    return lambda hidden: hidden + delta.to(hidden)


def project(delta: Float[Tensor, "*batch d_model"], epsilon: float) -> Float[Tensor, "*batch d_model"]:
    """Shorten every vector that is longer than `epsilon` to that length."""
    norm = delta.norm(dim=-1, keepdim=True)
    shortened: Tensor = delta * (epsilon / norm.clamp(min=epsilon))
    return shortened
