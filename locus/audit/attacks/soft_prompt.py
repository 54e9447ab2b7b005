"""Soft prompts: a few trainable embeddings before the prompt, fitted on half of the facts, tested on the other.

The strongest attack that leaves the weights alone (Schwinn et al. 2024, arXiv:2402.09063, attack embeddings of
forgotten data directly); the untaught half keeps it from simply storing the answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locus.audit.attacks.relearn import halves
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.intervals import Items
from locus.audit.questions import Questions, ask
from locus.audit.state import State
from locus.forward import batches, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model
from locus.progress import task
from locus.tokens import Encoded


@dataclass(frozen=True)
class SoftPrompt:
    """How the attacker trains."""

    n_tokens: int = 4
    """Trainable embeddings."""
    steps: int = 60
    lr: float = 0.1
    """Adam's, in units of the embeddings' standard deviation."""
    seed: int = 0
    """Seed of the embeddings at the start."""


def run(state: State, context: Context) -> FigureValues:
    """p(target) of the untaught half under the fitted prompt; nothing with fewer than two facts."""
    forget = context.questions["forget"]
    if len(forget) < 2:
        return FigureValues()
    taught, tested = halves(forget.facts, context.seed)
    with state.active() as model:
        longest = max(len(e.ids) for e in forget.encoded) + SoftPrompt().n_tokens
        if model.context_length is not None and longest > model.context_length:
            return FigureValues()
        fitted, prob = attack(
            model, forget.take(taught), forget.take(tested), SoftPrompt(seed=context.seed), context.max_tokens
        )
    return FigureValues(
        {
            "soft_prompt.prob": Items(tuple(forget.facts[i] for i in tested), prob),
            "soft_prompt.taught.prob": Items(tuple(forget.facts[i] for i in taught), fitted),
        }
    )


def attack(
    model: Model, taught: Questions, tested: Questions, how: SoftPrompt, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Fit the embeddings on `taught`; returns p(target) of `taught` and of `tested` under them.

    Args:
        model: Left as it is.
        taught: What the attacker fits on.
        tested: What it is judged on.
        how: Number of embeddings, steps and learning rate.
        max_tokens: Batch size in tokens.
    """
    table = model.module.get_parameter(f"{model.atlas.embed}.weight").detach()
    spread, width = table.float().std(), table.shape[1]
    start = 0 if model.bos is None else 1
    noise = torch.randn(how.n_tokens, width, generator=torch.Generator().manual_seed(how.seed))
    soft = (noise.to(spread.device) * spread).requires_grad_(True)

    def put(hidden: Tensor) -> Tensor:
        new = soft.to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        return torch.cat([hidden[:, :start], new, hidden[:, start + how.n_tokens :]], dim=1)

    with patched(model.module, outputs={model.atlas.embed: put}):
        optimizer = torch.optim.Adam([soft], lr=how.lr * float(spread))
        prefixed = batches([_prefixed(e, start, how.n_tokens) for e in taught.encoded], max_tokens)
        n_labels = sum(e.n_target for e in taught.encoded)
        with task("soft prompt", total=how.steps) as line, torch.enable_grad():
            for _ in range(how.steps):
                optimizer.zero_grad()
                for batch in prefixed:
                    loss = label_nll(label_logits(model, batch), batch).sum() / n_labels
                    loss.backward()
                optimizer.step()
                line.advance()
        with torch.no_grad():
            asked = [
                Questions(q.facts, q.examples, tuple(_prefixed(e, start, how.n_tokens) for e in q.encoded))
                for q in (taught, tested)
            ]
            fitted, prob = (ask(model, q, max_tokens).prob.values for q in asked)
            return fitted, prob


def _prefixed(encoded: Encoded, start: int, n: int) -> Encoded:
    """The same text with `n` placeholder tokens after BOS, whose embeddings are replaced."""
    ids = (*encoded.ids[:start], *([encoded.ids[0]] * n), *encoded.ids[start:])
    tokens = (*encoded.tokens[:start], *(["soft"] * n), *encoded.tokens[start:])
    return Encoded(ids, encoded.target_start + n, None, tokens, encoded.n_end)
