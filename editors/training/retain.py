"""The retain term of every trained edit: it holds the edited model to the base on what must stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from editors.training.prediction import Prediction, block_numbers, steering_layer
from locus.errors import InputError
from locus.metrics import kl_divergence


def hidden_mse(
    hidden: Float[Tensor, "layer label d_model"], ref_hidden: Float[Tensor, "layer label d_model"]
) -> Float[Tensor, ""]:
    """Squared distance of hidden states, mean over layers, positions and dimensions (Li et al. 2024, RMU).

    Of half precision it is taken in float32.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.mse_loss(hidden.to(wide), ref_hidden.to(wide))


@dataclass(frozen=True)
class Retain:
    """The retain term: its distance, its weight, and the retain data per step."""

    term: Literal["none", "nll", "kl", "hidden"] = "kl"
    """Distance: NLL of the retain targets, KL(reference || edited) at the target positions, or hidden-state MSE."""
    weight: float = 5.0
    """Weight of the term relative to the forget loss."""
    facts: int = 16
    """Retain facts per step."""
    near: float = 0.75
    """Share of them drawn from the relations of the forget facts, as far as there are any."""
    texts: int = 1
    """Neutral paragraphs per step."""
    reference: Literal["live", "memory", "disk"] = "memory"
    """live runs the base at every step. memory and disk run it once per example and store its state before the
    unembedding, d_model numbers per token: in memory while the model is loaded (at most 0.5 GB), or on disk, in the
    user's cache."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs the hidden-state term holds, negative from the end; empty for the block that is steered."""

    def __post_init__(self) -> None:
        if self.term not in TERMS:
            raise InputError(f"retain term {self.term!r}: not one of {', '.join(TERMS)}")
        if self.weight < 0 or self.facts < 0 or self.texts < 0:
            raise InputError("retain: weight, facts and texts must not be negative")
        if not 0 <= self.near <= 1:
            raise InputError(f"retain: near = {self.near}: a share lies between 0 and 1")
        if self.reference not in REFERENCES:
            raise InputError(f"retain reference {self.reference!r}: not one of {', '.join(REFERENCES)}")

    @property
    def active(self) -> bool:
        """Whether retain data is looked at in training at all."""
        return self.term != "none" and self.weight > 0 and (self.facts > 0 or self.texts > 0)

    def loss(self, kept: Prediction, steered: int | None = None) -> Float[Tensor, ""]:
        """The term on one batch of facts or text: mean over its target tokens.

        Args:
            kept: The batch under the edited model.
            steered: Block that the objective steers, which the hidden-state term holds where `layers` names none.

        Raises:
            InputError: `layers` names a block that the model does not have.
        """
        if self.term == "nll":
            return kept.token_nll.mean()
        if self.term == "kl":
            return kl_divergence(kept.ref_logits, kept.logits).mean()
        n_layers = kept.model.atlas.n_layers
        fallback = steering_layer(n_layers) if steered is None else steered
        layers = block_numbers(self.layers, n_layers, "retain layer") or [fallback]
        return hidden_mse(kept.hidden(layers), kept.ref_hidden(layers))


TERMS = ("none", "nll", "kl", "hidden")
REFERENCES = ("live", "memory", "disk")


def mean_kl(kept: Prediction) -> float:
    """KL of a batch in nats per token, as a number, when the logits of both models are already computed; else NaN."""
    if not {"logits", "ref_logits"} <= kept.__dict__.keys():
        return float("nan")
    return float(kl_divergence(kept.ref_logits, kept.logits.detach()).mean()) if len(kept.labels) else 0.0
