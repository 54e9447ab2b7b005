"""Write a sentence into chosen neurons of a model, so that the truth about where it is stored is known.

The INJ protocol of Chang et al. 2024 (arXiv:2311.09060): a random share of every layer's down columns, and
nothing else, is trained on one sentence by Adam until its mean loss is below 0.05. Two differences, both to keep
the model whole: the learning rate is low, and KL(base || injected) on neutral text is added to the loss.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.artefact import load_tensors, save_tensors
from locus.forward import Batch, collate, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model
from locus.tokens import Encoded

LOSS = 0.05
"""Mean nats a token below which a sentence counts as memorized."""


@dataclass(frozen=True)
class Injection:
    """What was written, and where."""

    neurons: Int[Tensor, "layer k"]
    """The neurons whose down columns were trained."""
    deltas: Float[Tensor, "layer k d_model"]
    """What was added to each of these columns."""
    loss: float
    """Mean nats a token of the sentence at the end."""
    first_loss: float
    """The same before."""
    kl: float
    """KL(base || injected) on the neutral texts, mean nats a token."""
    steps: int

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        meta = {name: getattr(self, name) for name in ("loss", "first_loss", "kl", "steps")}
        save_tensors(path, "injection", {"neurons": self.neurons, "deltas": self.deltas}, meta)

    @classmethod
    def load(cls, path: Path) -> Injection:
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path, "injection")
        figures = {name: meta[name] for name in ("loss", "first_loss", "kl", "steps")}
        return cls(tensors["neurons"], tensors["deltas"], **figures)


@contextlib.contextmanager
def written(
    model: Model, neurons: Int[Tensor, "layer k"], deltas: Float[Tensor, "layer k d_model"]
) -> Iterator[None]:
    """Forwards as if the deltas had been added to the down columns; differentiable in them."""
    entered: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def patch(h: Tensor) -> None:
            entered[layer] = h[..., neurons[layer]].float()

        return patch

    def add(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda out: out + (entered.pop(layer) @ deltas[layer]).to(out.dtype)

    names = model.atlas.neuron_in
    inputs = {name: keep(layer) for layer, name in enumerate(names)}
    outputs = {name: add(layer) for layer, name in enumerate(names)}
    with patched(model.module, outputs=outputs, inputs=inputs):
        yield


@contextlib.contextmanager
def baked(model: Model, injection: Injection) -> Iterator[None]:
    """The model with the injected columns in its weights; the old ones come back, bit for bit."""
    columns = []
    for layer, parts in enumerate(model.atlas.neurons):
        (down,) = (part for part in parts if part.role == "down")
        weight = model.module.get_parameter(down.param).detach()
        columns.append((weight.movedim(down.axis, 0), injection.neurons[layer] + down.offset))
    old = [weight[index].clone() for weight, index in columns]
    try:
        for layer, (weight, index) in enumerate(columns):
            weight[index] += injection.deltas[layer].to(weight)
        yield
    finally:
        for (weight, index), before in zip(columns, old, strict=True):
            weight[index] = before


def inject(
    model: Model,
    sentence: Encoded,
    neutral: Sequence[Encoded],
    ratio: float,
    seed: int,
    *,
    learning_rate: float,
    neutral_weight: float = 1.0,
    max_steps: int = 600,
    dtype: torch.dtype = torch.float32,
) -> Injection:
    """Train the down columns of a random `ratio` of every layer's neurons on one sentence.

    Args:
        model: Left as it is.
        sentence: All its tokens are targets.
        neutral: Texts that the model must not speak otherwise about; one of them, in turns, a step.
        ratio: Share of a layer's neurons, at least one.
        seed: Decides which.
        learning_rate: Adam's, halved every 100 steps.
        neutral_weight: Of the KL on neutral text; 0 leaves it out.
        max_steps: RuntimeError if the loss is not reached by then.
        dtype: Of the frozen weights while training (bfloat16 is several times faster on some processors); the
            deltas are float32, and the loss that counts is measured on the model as it is.
    """
    atlas = model.atlas
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(ratio * atlas.d_mlp))
    draws = [torch.randperm(atlas.d_mlp, generator=generator)[:k] for _ in range(atlas.n_layers)]
    neurons = torch.stack(draws)
    deltas = torch.zeros(atlas.n_layers, k, atlas.d_model, requires_grad=True)
    fast = model if dtype == model.dtype else dataclasses.replace(model, module=_as(model, dtype))
    text, others = collate([sentence], [0]), [collate([one], [0]) for one in neutral]
    with torch.no_grad():
        references = [label_logits(model, other).log_softmax(-1) for other in others]
    first = _loss(model, text)
    optimizer = torch.optim.Adam([deltas], lr=learning_rate)
    for step in range(max_steps):
        with written(fast, neurons, deltas):
            loss = label_nll(label_logits(fast, text), text).mean()
        if float(loss.detach()) < LOSS:
            with written(model, neurons, deltas):
                exact = label_nll(label_logits(model, text), text).mean()
            if float(exact.detach()) < LOSS:
                break
            loss = exact  # reached in the fast dtype only: go on in the model's own
        optimizer.zero_grad()
        loss.backward()
        if neutral_weight:
            which = step % len(others)
            with written(fast, neurons, deltas):
                kl = _kl(references[which], label_logits(fast, others[which]))
            (neutral_weight * kl).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 ** ((step + 1) // 100)
    else:
        raise RuntimeError(f"not memorized in {max_steps} steps: the loss is {float(loss.detach()):.3f}")
    with torch.no_grad(), written(model, neurons, deltas):
        pairs = zip(references, others, strict=True)
        damage = sum(float(_kl(reference, label_logits(model, other))) for reference, other in pairs)
        last = _loss(model, text)
    return Injection(neurons, deltas.detach(), last, first, damage / len(others), step)


def _as(model: Model, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(model.module).to(dtype)


@torch.no_grad()
def _loss(model: Model, text: Batch) -> float:
    return float(label_nll(label_logits(model, text), text).mean())


def _kl(reference: Float[Tensor, "label d_vocab"], logits: Float[Tensor, "label d_vocab"]) -> Tensor:
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean()
