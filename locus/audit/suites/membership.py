"""Membership inference on texts: has the model seen them. Every score is higher for what it probably has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locus import metrics
from locus.forward import batches, label_logits
from locus.model import Model
from locus.tokens import Encoded, encode_text

SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus", "reference")


def membership_scores(
    model: Model,
    texts: Sequence[str],
    fraction: float = 0.4,
    reference: Model | None = None,
    max_tokens: int = 2048,
) -> dict[str, list[float]]:
    """Each text's score under every attack; "reference" only where a reference model is given.

    Args:
        model: The model under attack.
        texts: Cut to the model's context.
        fraction: Share of the least likely tokens for Min-k % and Min-k %++.
        reference: A model of the same tokenizer that has not seen the texts.
        max_tokens: Batch size in tokens.
    """
    encoded = [_first_block(model, text) for text in texts]
    logprobs, standardized = _token_scores(model, encoded, max_tokens)
    found = {
        "loss": [metrics.loss_score(x) for x in logprobs],
        "zlib": [metrics.zlib_score(x, text) for x, text in zip(logprobs, texts, strict=True)],
        "min_k": [metrics.min_k(x, fraction) for x in logprobs],
        "min_k_plus_plus": [metrics.min_k(x, fraction) for x in standardized],
    }
    if reference is not None:
        others, _ = _token_scores(reference, encoded, max_tokens)
        found["reference"] = [metrics.reference_score(x, y) for x, y in zip(logprobs, others, strict=True)]
    return found


def _first_block(model: Model, text: str) -> Encoded:
    return encode_text(model, text, model.context_length or 2048)[0]


@torch.no_grad()
def _token_scores(
    model: Model, encoded: Sequence[Encoded], max_tokens: int
) -> tuple[list[Float[Tensor, " token"]], list[Float[Tensor, " token"]]]:
    """Log-probability of each text's tokens, plain and standardized by their distributions."""
    plain, standard = ([torch.zeros(e.n_target) for e in encoded] for _ in range(2))
    for batch in batches(encoded, max_tokens):
        logprobs = label_logits(model, batch).log_softmax(-1)
        labels = batch.labels.to(logprobs.device)
        own = logprobs.gather(-1, labels[:, None])[:, 0].cpu()
        z = metrics.standardized_logprobs(logprobs, labels).cpu()
        for example in set(batch.example.tolist()):
            rows = batch.example == example
            at = batch.cols[rows] + 1 - encoded[example].target_start
            plain[example][at] = own[rows]
            standard[example][at] = z[rows]
    return plain, standard
