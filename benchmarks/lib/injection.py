"""Write a sentence into chosen neurons of a model, so that the truth about where it is stored is known.

The INJ protocol of Chang et al. 2024 (arXiv:2311.09060): a random share of every layer's down columns, and
nothing else, is trained on one sentence by Adam until its mean loss is below 0.05. Two differences, both to keep
the model whole: the learning rate is low, and KL(base || injected) on neutral text is added to the loss. A third on
request: every column keeps its length and may only turn, so that no localizer finds it by its length.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from locus.files.artefact import load_tensors, save_tensors
from locus.forward import collate, label_logits, label_nll
from locus.hooks import patched
from locus.model import Model
from locus.tokens import Encoded

LOSS = 0.05
"""Mean nats a token below which a sentence counts as memorized."""
HALVED = 80
"""Steps after which the learning rate is halved."""


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
    model: Model, neurons: Int[Tensor, "row layer k"], deltas: Float[Tensor, "row layer k d_model"]
) -> Iterator[None]:
    """Forwards as if the deltas of its row had been added to the down columns; differentiable in them."""
    entered: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def patch(h: Tensor) -> None:
            index = neurons[:, layer, None].expand(-1, h.shape[1], -1)
            entered[layer] = h.gather(2, index).float()

        return patch

    def add(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda out: out + (entered.pop(layer) @ deltas[:, layer]).to(out.dtype)

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
    sentences: Sequence[Encoded],
    neutral: Sequence[Encoded],
    ratio: float,
    seeds: Sequence[int],
    *,
    learning_rate: float,
    neutral_weight: float = 1.0,
    keep_length: bool = False,
    max_steps: int = 600,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Injection]]:
    """Train the down columns of a random `ratio` of every layer's neurons on one sentence; on each, by itself.

    The sentences share a batch, a row each with its own columns, and nothing else: none sees another. Each is
    given back, with its index, as soon as it is memorized.

    Args:
        model: Left as it is.
        sentences: All their tokens are targets.
        neutral: Texts that the model must not speak otherwise about; one of them, in turns, a step.
        ratio: Share of a layer's neurons, at least one.
        seeds: One a sentence; decides which neurons.
        learning_rate: Adam's, halved every `HALVED` steps.
        neutral_weight: Of the KL on neutral text.
        keep_length: Scale every trained column back to the length it had, after each step.
        max_steps: RuntimeError if a loss is not reached by then.
        dtype: Of the frozen weights while training (bfloat16 is faster on some processors); the deltas are
            float32, and the loss that counts is measured on the model as it is.
    """
    fast = model if dtype == model.dtype else dataclasses.replace(model, module=_as(model, dtype))
    neurons = torch.stack([_drawn(model, ratio, seed) for seed in seeds])
    deltas = torch.zeros(*neurons.shape, model.atlas.d_model, requires_grad=True)
    columns = _columns(model, neurons) if keep_length else None
    references = [label_logits_of(model, one).log_softmax(-1) for one in neutral]
    optimizer = torch.optim.Adam([deltas], lr=learning_rate, betas=(0.9, 0.95))
    waiting = list(range(len(sentences)))
    for step in range(max_steps):
        turn = step % len(neutral)
        live = list(waiting)
        losses, total = _losses(
            fast, [sentences[i] for i in live], neutral[turn], references[turn], neurons[live], deltas[live]
        )
        for i, loss in zip(live, losses.tolist(), strict=True):
            if loss < LOSS:  # in the fast dtype: the model's own decides
                done = _measured(model, sentences[i], neutral, references, neurons[i], deltas[i], step)
                if done.loss < LOSS:
                    waiting.remove(i)
                    yield i, done
        if not waiting:
            return
        optimizer.zero_grad()
        (losses.sum() + neutral_weight * total).backward()
        optimizer.step()
        if columns is not None:
            with torch.no_grad():
                turned = columns + deltas
                deltas.copy_(turned * (columns.norm(dim=-1) / turned.norm(dim=-1))[..., None] - columns)
        optimizer.param_groups[0]["lr"] = learning_rate * 0.5 ** ((step + 1) // HALVED)
    raise RuntimeError(f"{len(waiting)} sentences not memorized in {max_steps} steps")


def _drawn(model: Model, ratio: float, seed: int) -> Int[Tensor, "layer k"]:
    """The neurons that are trained."""
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(ratio * model.atlas.d_mlp))
    draws = [torch.randperm(model.atlas.d_mlp, generator=generator)[:k] for _ in range(model.atlas.n_layers)]
    return torch.stack(draws)


def _columns(
    model: Model, neurons: Int[Tensor, "sentence layer k"]
) -> Float[Tensor, "sentence layer k d_model"]:
    """The down columns of these neurons as they are."""
    layers = []
    for layer, parts in enumerate(model.atlas.neurons):
        (down,) = (part for part in parts if part.role == "down")
        weight = model.module.get_parameter(down.param).detach().movedim(down.axis, 0)
        layers.append(weight[neurons[:, layer] + down.offset].float())
    return torch.stack(layers, dim=1)


def _losses(
    model: Model,
    sentences: Sequence[Encoded],
    neutral: Encoded,
    reference: Float[Tensor, "label d_vocab"],
    neurons: Int[Tensor, "sentence layer k"],
    deltas: Float[Tensor, "sentence layer k d_model"],
) -> tuple[Float[Tensor, " sentence"], Float[Tensor, ""]]:
    """Mean nats a token of every sentence, and the sum of their KLs on a neutral text."""
    n = len(sentences)
    batch = collate([*sentences, *[neutral] * n], range(2 * n))
    with written(model, neurons.repeat(2, 1, 1), deltas.repeat(2, 1, 1, 1)):
        logits = label_logits(model, batch)
    own = batch.example < n
    nll = F.cross_entropy(logits[own], batch.labels[own], reduction="none")
    lengths = torch.tensor([one.n_target for one in sentences])
    losses = torch.zeros(n).index_add(0, batch.example[own], nll) / lengths
    return losses, n * _kl(reference.repeat(n, 1), logits[~own])


def label_logits_of(model: Model, text: Encoded) -> Float[Tensor, "label d_vocab"]:
    """Logits of one text's targets."""
    with torch.no_grad():
        return label_logits(model, collate([text], [0]))


def _measured(
    model: Model,
    sentence: Encoded,
    neutral: Sequence[Encoded],
    references: Sequence[Float[Tensor, "label d_vocab"]],
    neurons: Int[Tensor, "layer k"],
    deltas: Float[Tensor, "layer k d_model"],
    steps: int,
) -> Injection:
    """What was reached, in the model's own dtype."""
    text = collate([sentence], [0])
    deltas = deltas.detach().clone()
    with written(model, neurons[None], deltas[None]):
        last = float(label_nll(label_logits_of(model, sentence), text).mean())
        damage = 0.0
        if last < LOSS:
            pairs = zip(references, neutral, strict=True)
            damage = sum(float(_kl(one, label_logits_of(model, other))) for one, other in pairs) / len(
                neutral
            )
    first = float(label_nll(label_logits_of(model, sentence), text).mean())
    return Injection(neurons, deltas, last, first, damage, steps)


def _as(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    module = copy.deepcopy(model.module)
    torch.nn.Module.to(module, dtype)
    return module


def _kl(reference: Float[Tensor, "label d_vocab"], logits: Float[Tensor, "label d_vocab"]) -> Tensor:
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1).mean()
