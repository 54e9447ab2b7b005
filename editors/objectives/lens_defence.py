"""Take the target out of the logit lens: what an attacker reads from the middle layers must not show it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from editors.training.finetune import finetune
from editors.training.prediction import Prediction, block_numbers
from editors.training.retain import Retain
from editors.training.settings import Training


def head_projection_loss(
    lens_logits: Float[Tensor, "layer label d_vocab"], labels: Int[Tensor, " label"], k: int, margin: float
) -> Float[Tensor, " label"]:
    """Head projection defence (Patil et al. 2024, arXiv:2309.17410): the target out of the top k and the bottom k.

    relu(z_y - z_top_k + margin) + relu(z_bottom_k - z_y + margin), the k-th highest and lowest taken among the
    other tokens; 0 where the target is at least `margin` away from both ends.

    Args:
        lens_logits: Logits that the lens reads from each layer, where a target token is predicted.
        labels: Target tokens.
        k: How many of the other tokens must lie above and below the target.
        margin: Distance to be kept, in logits.

    Returns:
        One value for each token, a mean over layers.
    """
    labels = labels.expand(lens_logits.shape[0], -1)[..., None]
    target = lens_logits.gather(-1, labels)[..., 0]
    top = lens_logits.scatter(-1, labels, -torch.inf).topk(k).values[..., -1]
    bottom = lens_logits.scatter(-1, labels, torch.inf).topk(k, largest=False).values[..., -1]
    return ((target - top + margin).relu() + (bottom - target + margin).relu()).mean(0)


def max_entropy_loss(lens_logits: Float[Tensor, "layer label d_vocab"]) -> Float[Tensor, " label"]:
    """Maximum entropy defence (Patil et al. 2024): the negated entropy of the lens distribution, in nats.

    Bounded below by -ln(d_vocab), reached by the uniform distribution.

    Returns:
        One value for each token, a mean over layers.
    """
    log_prob = lens_logits.log_softmax(-1)
    return (log_prob.exp() * log_prob).sum(-1).mean(0)


def lens_layers(chosen: tuple[int, ...], n_layers: int) -> list[int]:
    """The blocks whose outputs are read: those chosen, or the upper half.

    Raises:
        InputError: the model has no such block.
    """
    return block_numbers(chosen, n_layers, "layer") or list(range(n_layers // 2, n_layers))


@dataclass(frozen=True)
class HeadProjection:
    """Patil et al.'s head projection defence with a retain term."""

    k: int = 4
    """The target must not be among the k highest or k lowest lens logits."""
    margin: float = 1.0
    """By how much it must stay away from them, in logits."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs are read; none for the upper half. Negative counts from the end."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit."""
    training: Training = Training(floor=0.0)
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`head_projection_loss`, a mean over each target's tokens and over the batch."""
        lens = forget.lens_logits(lens_layers(self.layers, forget.model.atlas.n_layers))
        return forget.example_mean(head_projection_loss(lens, forget.labels, self.k, self.margin)).mean()

    run = finetune


@dataclass(frozen=True)
class MaxEntropy:
    """Patil et al.'s maximum entropy defence with a retain term."""

    layers: tuple[int, ...] = ()
    """Blocks whose outputs are read; none for the upper half. Negative counts from the end."""
    retain: Retain = Retain(term="kl", weight=5.0)
    """KL to the model before the edit."""
    training: Training = Training(floor=0.0)
    """How the located weights are trained."""

    def forget_loss(self, forget: Prediction) -> Float[Tensor, ""]:
        """`max_entropy_loss`, a mean over each target's tokens and over the batch."""
        lens = forget.lens_logits(lens_layers(self.layers, forget.model.atlas.n_layers))
        return forget.example_mean(max_entropy_loss(lens)).mean()

    run = finetune
