"""The settings shared by all trained edits: optimizer, steps, batches, stopping rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from editors.training.latent_adversary import LatentAttack
from editors.training.sophia import SophiaG
from locus.errors import InputError
from locus.random_streams import generator


@dataclass(frozen=True)
class Training:
    """How the located weights are trained. Weight decay pulls each delta to 0: the weight back to its old value."""

    steps: int = 30
    """Maximum number of optimizer steps."""
    min_steps: int = 20
    """Minimum number of steps before `goal` may stop the run: steps after forgetting repair the other facts."""
    optimizer: Literal["adamw", "sgd", "sophia"] = "adamw"
    """AdamW, plain SGD, or Sophia-G (second order; Jia et al. 2024, SOUL)."""
    lr: float = 1e-3
    """Peak learning rate of the deltas; 10 to 100 times what would suit the full model."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    weight_decay: float = 0.0
    """Weight decay of the deltas, decoupled from the gradient; SGD applies it through the momentum."""
    momentum: float = 0.0
    """Momentum of SGD."""
    clip: float = 1.0
    """Norm to which the gradient of all deltas together is clipped; 0 for no clipping."""
    forget_per_step: int = 16
    """Forget examples per step."""
    reworded: int = 0
    """Additional forget examples per step in other words: after a context prefix, or the subject in a short frame."""
    batch_tokens: int = 4096
    """Padded tokens per forward; a step with more accumulates its gradient over several forwards."""
    floor: float = 0.005
    """Probability below which a forget example is no longer pushed; 0 pushes always."""
    goal: float = 0.01
    """Stop after `min_steps` when the forget examples' mean probability is below this and none is top-1."""
    utility: float = 0.5
    """Stop when less than this share of the retain facts that the base has right is still right; 0 never stops."""
    max_kl: float = 2.0
    """Stop when the KL from the reference on retain data exceeds this, in nats per token; 0 never stops."""
    check_every: int = 10
    """Steps between two checks of utility."""
    save_every: int = 10
    """Steps between two saved states, when a folder is given."""
    lora_rank: int = 0
    """Rank of LoRA deltas of whole matrices, through peft; 0 trains the located weights themselves."""
    attack: LatentAttack = LatentAttack()
    """Latent adversary inside each step."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    """How trained float32 values are rounded to the checkpoint's dtype. nearest: to the nearest value. stochastic: up
    or down at random, so that small updates survive on average. compensated: the forward uses the rounded weights, and
    the rounding error is carried to later steps."""
    seed: int = 0
    """Seed of every random draw; a resumed run draws the same as an uninterrupted one."""

    def __post_init__(self) -> None:
        for name in ("steps", "forget_per_step", "batch_tokens", "check_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr = {self.lr}: must be a positive number")
        for name in (
            "weight_decay",
            "momentum",
            "clip",
            "floor",
            "goal",
            "utility",
            "max_kl",
            "warmup",
            "lora_rank",
            "reworded",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"{name} = {getattr(self, name)}: must not be negative")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("rounding", ROUNDINGS),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} = {getattr(self, name)!r}: not one of {', '.join(known)}")
        if self.lora_rank and self.rounding == "compensated":
            raise InputError(
                "rounding = 'compensated' rounds single weights, which LoRA has none of: take nearest or stochastic, "
                "or lora_rank = 0"
            )


OPTIMIZERS = ("adamw", "sgd", "sophia")
SCHEDULES = ("constant", "linear", "cosine")
ROUNDINGS = ("nearest", "stochastic", "compensated")

BOUNDED = Training(lr=2e-3, forget_per_step=8, reworded=8, floor=0.0, goal=0.005)
"""For objectives that converge to a target of their own: no floor, several wordings."""


def make_optimizer(training: Training, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over the deltas alone."""
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.lr, momentum=training.momentum, weight_decay=decay)
    if training.optimizer == "sophia":
        return SophiaG(parameters, lr=training.lr, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=training.lr, weight_decay=decay, fused=True)


def lr_at(training: Training, step: int) -> float:
    """Learning rate of step `step`, counted from 0: warm-up, then the schedule down to 0 at `steps`."""
    if step < training.warmup:
        return training.lr * (step + 1) / training.warmup
    if training.schedule == "constant":
        return training.lr
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    left = 1 - done if training.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return training.lr * left


def draw(seed: int, stream: str, step: int, n: int, size: int) -> list[int]:
    """Which `size` of `n` items step `step` sees: shuffled passes over all items, computed without state.

    An item is drawn at most once per step, so a step that spans two passes can hold fewer than `size` items.

    Args:
        seed: Seed of the run.
        stream: Name of the draw; other names draw independently.
        step: Counted from 0.
        n: Number of items.
        size: Items per step.

    Returns:
        Item numbers, sorted.
    """
    size = min(n, size)
    if size == n:
        return list(range(n))
    if size == 0:
        return []
    drawn: list[int] = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, n)
        order = torch.randperm(n, generator=generator(seed, stream, epoch))
        drawn.append(int(order[place]))
    return sorted(set(drawn))
