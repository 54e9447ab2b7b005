"""What the edited model predicts for one batch: the quantities that objectives are made of.

Each is computed on first access, so an objective pays only for what it reads: RMU never runs the layers above its
own, NPO never computes reference logits. The reference model is the same module with its deltas silenced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from editors.training.latent_adversary import Perturbation
from editors.training.parametrize import Trained
from locus.errors import InputError
from locus.forward import Batch, example_sum, label_logits
from locus.hooks import record, stop_after
from locus.lens import lens_logits
from locus.metrics import token_nll
from locus.model import Model

Answer = Callable[[Sequence[int]], "Prediction"]
"""Example numbers -> the model's prediction of another answer to each of the same prompts."""
StoredLogits = Callable[[Batch], Float[Tensor, "label d_vocab"]]
"""Batch -> the reference's logits at its labels."""


class Prediction:
    """One batch of examples under the model as it is now, differentiable in the deltas."""

    def __init__(
        self,
        model: Model,
        deltas: Trained,
        batch: Batch,
        reference: Float[Tensor, " example"] | None = None,
        answer: Answer | None = None,
        stored: StoredLogits | None = None,
        perturbation: Perturbation | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            model: The model, with `deltas` attached.
            deltas: Silenced whenever the reference is asked.
            batch: The examples; `batch.examples` are their numbers in the caller's list.
            reference: The reference's NLL of every example of that list, when it is already known.
            answer: Gives the prediction of another answer (a refusal, say) to the same prompts.
            stored: Reads the reference's logits at a batch's labels from the store; None runs the base.
            perturbation: Stays on whenever the edited model reads the batch; the reference never sees it.
        """
        self.model, self.deltas, self.batch = model, deltas, batch.to(model.device)
        self._reference, self._answer, self._stored = reference, answer, stored
        self._perturbation = perturbation

    @property
    def n_examples(self) -> int:
        """Number of examples in the batch."""
        return len(self.batch.examples)

    @property
    def has_run(self) -> bool:
        """Whether the whole forward has been run, so that `nll` costs nothing."""
        return "logits" in self.__dict__

    @cached_property
    def logits(self) -> Float[Tensor, "label d_vocab"]:
        """Logits that predict each target token."""
        with self._perturbed():
            return label_logits(self.model, self.batch)

    @cached_property
    def ref_logits(self) -> Float[Tensor, "label d_vocab"]:
        """The same under the reference model; carries no gradient."""
        if self._stored is not None:
            return self._stored(self.batch)
        with torch.no_grad(), self.deltas.silenced():
            return label_logits(self.model, self.batch)

    @property
    def labels(self) -> Int[Tensor, " label"]:
        """The target tokens, example after example."""
        return self.batch.labels

    @cached_property
    def token_nll(self) -> Float[Tensor, " label"]:
        """Negative log-likelihood of each target token, in nats."""
        return token_nll(self.logits, self.labels)

    @cached_property
    def n_tokens(self) -> Int[Tensor, " example"]:
        """Tokens of each target."""
        rows = self.batch.rows
        return rows.new_zeros(self.n_examples).index_add(0, rows, torch.ones_like(rows))

    @cached_property
    def nll(self) -> Float[Tensor, " example"]:
        """Negative log-likelihood of each target, summed over its tokens, in nats."""
        return example_sum(self.token_nll, self.batch)

    @cached_property
    def ref_nll(self) -> Float[Tensor, " example"]:
        """The same under the reference model; carries no gradient."""
        if self._reference is not None:
            return self._reference.to(self.batch.ids.device)[torch.tensor(self.batch.examples)]
        return example_sum(token_nll(self.ref_logits, self.labels), self.batch)

    @cached_property
    def correct(self) -> Bool[Tensor, " example"]:
        """Whether every token of the target, the end of turn aside, is the model's first choice."""
        wrong = ((self.logits.detach().argmax(-1) != self.labels) & ~self.batch.ends).float()
        return example_sum(wrong, self.batch) == 0

    @cached_property
    def token_correct(self) -> Float[Tensor, " example"]:
        """Share of the target's tokens that are the model's first choice (memorization accuracy)."""
        hit = (self.logits.detach().argmax(-1) == self.labels).float()
        return self.example_mean(hit)

    @cached_property
    def answer(self) -> Prediction:
        """The prediction of the other answer to each of the same prompts, in the same order."""
        if self._answer is None:
            raise ValueError("this objective was given no other answers")
        other = self._answer(self.batch.examples)
        if self._perturbation is None:
            return other
        return other.under(self._perturbation.on_prompts(other.batch.ids.shape[1]))

    def hidden(self, layers: Sequence[int]) -> Float[Tensor, "layer label d_model"]:
        """Outputs of blocks at the positions that predict a target token; nothing above the last one runs."""
        with self._perturbed():
            return _hidden(self.model, self.batch, layers, detach=False)

    def ref_hidden(self, layers: Sequence[int]) -> Float[Tensor, "layer label d_model"]:
        """The same under the reference model; carries no gradient."""
        with torch.no_grad(), self.deltas.silenced():
            return _hidden(self.model, self.batch, layers, detach=True)

    def lens_logits(self, layers: Sequence[int]) -> Float[Tensor, "layer label d_vocab"]:
        """Block outputs through the logit lens: the model's own final norm and unembedding."""
        return lens_logits(self.model, self.hidden(layers))

    def example_mean(self, values: Float[Tensor, " label"]) -> Float[Tensor, " example"]:
        """Mean of a per-token value over each example's target."""
        return example_sum(values, self.batch) / self.n_tokens

    def only(self, keep: Bool[Tensor, " example"]) -> Prediction:
        """The examples where `keep`, sharing what has been computed already."""
        batch, kept_labels = _narrow(self.batch, keep.to(self.batch.rows.device))
        narrowed = Prediction(self.model, self.deltas, batch, self._reference, self._answer, self._stored)
        for name in ("logits", "ref_logits"):
            if name in self.__dict__:
                narrowed.__dict__[name] = self.__dict__[name][kept_labels]
        return narrowed

    def under(self, perturbation: Perturbation) -> Prediction:
        """The same batch as the edited model reads it under a perturbation; another answer under that of its prompt."""
        return Prediction(
            self.model, self.deltas, self.batch, self._reference, self._answer, self._stored, perturbation
        )

    def _perturbed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._perturbation is None else self._perturbation.on(self.model)


def steering_layer(n_layers: int) -> int:
    """The block that RMU steers when none is named: the 7th of 32 in its paper, at the same depth elsewhere."""
    return n_layers * 7 // 32


def block_numbers(layers: Sequence[int], n_layers: int, what: str) -> list[int]:
    """Block numbers counted from 0, of numbers that may count from the end.

    Args:
        layers: Numbers from -n_layers to n_layers - 1.
        n_layers: Blocks of the model.
        what: The option that gave them, for the error.

    Raises:
        InputError: the model has no such block.
    """
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            raise InputError(f"{what} {layer}: the model has layers 0 to {n_layers - 1}")
    return [layer % n_layers for layer in layers]


def _narrow(batch: Batch, keep: Bool[Tensor, " example"]) -> tuple[Batch, Bool[Tensor, " label"]]:
    """The kept rows of a batch, and which of its labels they hold."""
    kept_labels = keep[batch.rows]
    new_row = keep.cumsum(0) - 1
    narrowed = Batch(
        ids=batch.ids[keep],
        attention_mask=batch.attention_mask[keep],
        rows=new_row[batch.rows[kept_labels]],
        cols=batch.cols[kept_labels],
        labels=batch.labels[kept_labels],
        example=batch.example[kept_labels],
        examples=tuple(e for e, k in zip(batch.examples, keep.tolist(), strict=True) if k),
        ends=batch.ends[kept_labels],
    )
    return narrowed, kept_labels


def _hidden(
    model: Model, batch: Batch, layers: Sequence[int], detach: bool
) -> Float[Tensor, "layer label d_model"]:
    """Block outputs at the labelled positions, by a forward that ends at the highest block asked for."""
    names = [model.atlas.blocks[layer] for layer in layers]
    highest = model.atlas.blocks[max(layers)]
    with record(model.module, outputs=names, detach=detach) as recording, stop_after(model.module, highest):
        model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
    return torch.stack([recording.outputs[name][batch.rows, batch.cols] for name in names])
