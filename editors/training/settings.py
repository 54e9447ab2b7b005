"""The settings that every trained edit shares: optimizer, steps, batches, and when to stop."""

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
    """How the located weights are trained. Decay pulls a delta to zero, that is, the weight to its old value."""

    steps: int = 30
    """Most optimizer steps."""
    min_steps: int = 20
    """Fewest steps before `goal` may stop the run: the steps after forgetting repair the other facts."""
    optimizer: Literal["adamw", "sgd", "sophia"] = "adamw"
    """AdamW, plain SGD, or Sophia-G (second order; Jia et al. 2024, SOUL)."""
    lr: float = 1e-3
    """Peak learning rate of the deltas; 10 to 100 times what would suit the full model."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at zero."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    weight_decay: float = 0.0
    """Decay of the deltas, decoupled from the gradient; in SGD it passes through the momentum."""
    momentum: float = 0.0
    """Momentum of SGD."""
    clip: float = 1.0
    """Largest norm of the gradient of all deltas together; 0 for no clipping."""
    forget_per_step: int = 16
    """Forget examples a step."""
    reworded: int = 0
    """Forget examples a step that are asked in other words besides: behind an opening, or by their subject alone."""
    batch_tokens: int = 4096
    """Padded tokens in one forward; a step with more accumulates its gradient over several."""
    floor: float = 0.005
    """A forget example whose probability is below this is not pushed further; 0 pushes always."""
    goal: float = 0.01
    """Stop after `min_steps` when the forget examples' mean probability is below this and none is top-1."""
    utility: float = 0.5
    """Stop when fewer than this share of the retain facts that were right at first still are; 0 never stops."""
    max_kl: float = 2.0
    """Stop when the KL from the reference on retain data exceeds this, in nats a token; 0 never stops."""
    check_every: int = 10
    """Steps between two looks at utility."""
    save_every: int = 10
    """Steps between two resumable states, when a folder is given."""
    lora_rank: int = 0
    """Train low-rank deltas of this rank through peft, of whole matrices; 0 trains the located weights themselves."""
    attack: LatentAttack = LatentAttack()
    """A latent adversary inside each step."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest"
    """How trained float32 values become the checkpoint's dtype: to the nearest, at random so that small updates
    survive on average, or compensated: trained with the weights as they will be saved, what rounding leaves over is
    carried on to later steps."""
    seed: int = 0
    """Fixes every draw; a resumed run draws what the undisturbed run would have drawn."""

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
"""For objectives that rest at a goal of their own: pushed to the end, and in several wordings."""


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
    """Which `size` of `n` things step `step` sees: shuffled passes over all, nothing remembered between calls.

    At most all `n` are drawn, each once. A step that spans two passes may hold fewer than `size` things,
    when the second pass begins with one that the first ended with.
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
