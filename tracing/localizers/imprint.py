"""Imprint: value vectors that point where training on the target would push them. A method of ours.

Gradient descent on a text changes the value vector v of neuron i along
    A_i = sum over positions t of h_it g_t,   g_t the gradient of the objective at the MLP's output,
so a column that was written for this text still leans that way. Two signs of it are added up, each as a robust
z-score within its layer (median and median absolute deviation), clipped to [-1, `clip`]:

- alignment: the cosine of v_i and A_i. Its numerator is the neuron's gradient saliency and its denominator takes
  out what saliency mostly measures, the sizes of activations, gradients and columns. The objective is the log-odds
  of the target, z_y - logsumexp of the other logits: unlike log p, its gradient does not vanish where the
  model is already sure. |A_i|^2 = h_i' K h_i with K the positions' Gram matrix of g, so one backward is enough.
- balance: how much longer v_i is than the neuron's key vectors (up and gate) predict. Scaling v and shrinking the up
  key vector by the same factor changes nothing, and weight decay settles each neuron where the two agree; what was
  written into the column afterwards stands out. This part is blind to the target: it finds columns that were
  changed after pretraining, whatever for, if that made them longer. Set `balance=0` for knowledge that came with
  pretraining, or where columns may only have turned.

The gradient of a model that knows the text by heart is no longer the one that taught it. So it is taken with the text
half forgotten: the activations of the `dimmed` share of each layer's neurons with the largest imbalance are
multiplied by `dim` in that pass, which is the same as scaling their value vectors down. Without balance, dim all of
them a little (`balance=0 dimmed=1 dim=0.8`).

Use it for text memorized by fine-tuning; on the INJ benchmark (benchmarks/README.md, with its parts left out one by
one) it finds several times what saliency finds. Cost: one forward and one backward per example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.forward import Batch, label_logits
from locus.hooks import patched
from locus.model import Model
from locus.scores import NeuronScores, count_of
from locus.weight_source import held
from tracing.gradients.neuron_gradients import neuron_grid, show_gradient, tapped
from tracing.localizer import Cost, ExampleLoop, Examples
from tracing.localizers.activation_norm import down_norms
from tracing.localizers.learned_masks import gated
from tracing.score_algebra import robust_spread


@dataclass(frozen=True)
class Imprint:
    """Alignment of value vectors with the gradient that would write the target, and their imbalance."""

    alignment: float = 2.0
    """Weight of the cosine's z-score."""
    balance: float = 1.0
    """Weight of the z-score of the value vector's length beyond what the key vectors predict; 0 leaves it out."""
    clip: float = 6.0
    """Largest z-score that counts."""
    dim: float = 0.6
    """Factor of the dimmed neurons' activations while the gradient is taken; 1 dims nothing."""
    dimmed: float = 0.1
    """Share of each layer's neurons that is dimmed: those with the largest imbalance; 1 for all."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward per fact, none where alignment has no weight."""
        n_examples = len(facts) if self.alignment else 0
        return Cost(n_examples, n_examples)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Score every neuron on `facts`; a retain set is not used.

        Raises:
            InputError: no facts, both weights are 0, or a share outside (0, 1].
        """
        if not self.alignment and not self.balance:
            raise InputError("alignment and balance are both 0: give one of them a weight")
        if not 0 < self.dim <= 1 or not 0 < self.dimmed <= 1:
            raise InputError(f"dim {self.dim} and dimmed {self.dimmed}: both lie above 0 and at most at 1")
        values, imbalance = neuron_grid(model), imbalance_of(model)
        if self.alignment:
            gates = self._gates(imbalance)
            cosine = alignment_of(model, facts, gates, batch_tokens=batch_tokens)
            values += self.alignment * robust_z(cosine).clamp(-1, self.clip)
        if self.balance:
            values += self.balance * robust_z(imbalance).clamp(-1, self.clip)
        return NeuronScores(values.cpu(), "imprint", model.fingerprint, model.atlas, asdict(self))

    def _gates(self, imbalance: Float[Tensor, "layer neuron"]) -> Float[Tensor, "layer neuron"] | None:
        if self.dim == 1:
            return None
        count = count_of(float(self.dimmed), imbalance.shape[1])
        chosen = imbalance.topk(count, dim=1).indices
        return torch.ones_like(imbalance).scatter(1, chosen, self.dim)


def alignment_of(
    model: Model,
    facts: Examples,
    gates: Float[Tensor, "layer neuron"] | None = None,
    *,
    batch_tokens: int = 4096,
) -> Float[Tensor, "layer neuron"]:
    """Cosine of every value vector with the gradient of the target's log-odds in it, mean over facts.

    Args:
        model: Left as it is.
        facts: Whose targets.
        gates: Factors of the activations while the gradient is taken, above 0; none for 1.
        batch_tokens: Tokens computed at once.
    """
    loop = ExampleLoop.of(model, facts, "its alignment")
    norms = down_norms(model)

    def of_batch(batch: Batch) -> tuple[Tensor]:
        written: dict[int, Tensor] = {}
        grid = neuron_grid(model)

        def keep(layer: int, _: Tensor, gradient: Tensor) -> None:
            written[layer] = gradient.float()

        def add(layer: int, h: Tensor, gradient: Tensor) -> None:
            g, h = written.pop(layer), h.float()
            push = (h * gradient.float()).sum(1)
            gram = torch.einsum("bpd,bqd->bpq", g, g)
            size = torch.einsum("bpn,bpq,bqn->bn", h, gram, h).clamp(min=0).sqrt()
            cosine = push / (size * norms[layer].to(size.device)).clamp(min=torch.finfo(size.dtype).tiny)
            grid[layer] = cosine.sum(0).to(grid.device)

        outputs: dict[str, Callable[[Tensor], Tensor]] = {
            name: partial(show_gradient, layer=layer, visit=keep)
            for layer, name in enumerate(model.atlas.neuron_in)
        }
        dimming = contextlib.nullcontext() if gates is None else gated(model, gates)
        with dimming, torch.enable_grad(), tapped(model, add), patched(model.module, outputs=outputs):
            log_odds(model, batch).sum().backward()
        return (grid,)

    (total,) = loop.over_batches(of_batch, "alignment", batch_tokens)
    return total / len(loop.encoded)


def log_odds(model: Model, batch: Batch) -> Float[Tensor, " label"]:
    """ln(p / (1 - p)) of every label, as its logit minus the logsumexp of all others: exact where p is near 1."""
    logits = label_logits(model, batch)
    labels = batch.labels.to(logits.device)[:, None]
    others = logits.scatter(-1, labels, -torch.inf).logsumexp(-1)
    return logits.gather(-1, labels)[:, 0] - others


def imbalance_of(model: Model) -> Float[Tensor, "layer neuron"]:
    """ln of each value vector's norm, beyond what a robust line in ln of its key norms predicts in its layer."""
    columns = down_norms(model).log()
    residual = torch.zeros_like(columns)
    for layer, rows in enumerate(row_norms(model)):
        residual[layer] = _beyond_line(columns[layer], rows.log().to(columns.device))
    return residual


def row_norms(model: Model) -> list[Float[Tensor, "role neuron"]]:
    """Norms of every neuron's up key vector and, where there is one, its gate key vector."""
    d_mlp = model.atlas.d_mlp
    found = []
    for parts in model.atlas.neurons:
        norms = []
        for part in parts:
            if part.role in ("up", "gate"):
                norm = held(model, part.param).float().norm(dim=1 - part.axis)
                norms.append(norm[part.offset : part.offset + d_mlp])
        found.append(torch.stack(norms))
    return found


def _beyond_line(
    y: Float[Tensor, " neuron"], x: Float[Tensor, "role neuron"], rounds: int = 5
) -> Float[Tensor, " neuron"]:
    """Residual of y on 1 and x by least squares, reweighted so that outliers do not bend the line.

    By normal equations in float64, whose sums are the same at every run; LAPACK's least squares are not, to the bit.
    """
    design, wanted = torch.cat([torch.ones_like(x[:1]), x]).double(), y.double()
    weights = torch.ones_like(wanted)
    residual = wanted - wanted.median()
    for _ in range(rounds):
        weighted = weights * design
        square = (weighted[:, None] * design).sum(-1)
        square.diagonal().add_(1e-12 * square.trace())  # two rows may be the same
        solution = torch.linalg.solve(square, (weighted * wanted).sum(-1))
        residual = wanted - (solution[:, None] * design).sum(0)
        scale = 1.4826 * residual.abs().median().clamp(min=1e-12)
        weights = 1 / (1 + (residual / (2 * scale)) ** 2)
    return residual.to(y.dtype)


def robust_z(values: Float[Tensor, "layer neuron"]) -> Float[Tensor, "layer neuron"]:
    """Distance from the layer's median in units of its `robust_spread`."""
    centred = values - values.median(dim=1, keepdim=True).values
    return centred / robust_spread(centred)
