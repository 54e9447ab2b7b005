"""The logit lens: what the model would say if it stopped at a layer (nostalgebraist 2020).

The residual stream after each block goes through the final norm and the unembedding as if it were the
last one. At the last layer that is the model's own answer, exactly. Patil et al. 2024 (arXiv:2309.17410) use
it as an attack: an edited model may still hold the answer at an inner layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.forward import batches, label_logits
from locus.hooks import record
from locus.model import Model
from locus.tokens import Encoded


@dataclass(frozen=True)
class LensScores:
    """The first target token seen through the lens at the last prompt position, after each block."""

    rank: Int[Tensor, "example layer"]
    """Tokens with a higher logit than the target; 0 where the layer would answer right."""
    bottom_rank: Int[Tensor, "example layer"]
    """Tokens with a lower logit than the target; 0 where it is the least likely of all."""
    prob: Float[Tensor, "example layer"]
    """Probability of the target."""


def lens_logits(model: Model, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Unembed residual-stream states as the model does its last ones: final norm, unembedding, softcap.

    Returns:
        Logits in float32.
    """
    modules = dict(model.module.named_modules())
    norm, head = modules[model.atlas.final_norm], modules[model.atlas.unembed]
    logits: Tensor = head(norm(hidden.to(next(norm.parameters(), hidden).device))).float()
    softcap = getattr(model.module.config.get_text_config(), "final_logit_softcapping", None)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def lens_scores(model: Model, encoded: Sequence[Encoded], max_tokens: int = 4096) -> LensScores:
    """Rank and probability of each first target token after every block, at the last prompt position.

    Args:
        model: Left as it is.
        encoded: The examples.
        max_tokens: Batch size in tokens.
    """
    shape = (len(encoded), model.atlas.n_layers)
    rank, bottom = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    prob = torch.zeros(shape)
    for batch in batches([_first_target(one) for one in encoded], max_tokens):
        with torch.no_grad(), record(model.module, outputs=model.atlas.blocks) as seen:
            label_logits(model, batch)
        for layer, block in enumerate(model.atlas.blocks):
            with torch.no_grad():
                state = seen.outputs[block]
                logits = lens_logits(model, state[batch.rows.to(state.device), batch.cols.to(state.device)])
            labels = batch.labels.to(logits.device)[:, None]
            own = logits.gather(-1, labels)
            example = batch.example.cpu()
            rank[example, layer] = (logits > own).sum(-1).cpu()
            bottom[example, layer] = (logits < own).sum(-1).cpu()
            prob[example, layer] = logits.softmax(-1).gather(-1, labels)[:, 0].cpu()
    return LensScores(rank, bottom, prob)


def _first_target(encoded: Encoded) -> Encoded:
    """The same prompt with only the first token of its target."""
    end = encoded.target_start + 1
    return Encoded(encoded.ids[:end], encoded.target_start, encoded.subject, encoded.tokens[:end])
