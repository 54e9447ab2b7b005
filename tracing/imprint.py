"""Imprint: value vectors that point where training on the target would have pushed them. A method of ours.

Gradient descent on a text changes the down column v of neuron i along
    A_i = sum over positions t of h_it g_t,   g_t the gradient of the objective at the MLP's output,
so a column that was written for this text still leans that way. Two signs of it are added up, each as a robust
z-score within its layer (median and median absolute deviation), clipped to [-1, `clip`]:

- alignment: the cosine of v_i and A_i. Its numerator is the neuron's gradient saliency and its denominator takes
  out what saliency mostly measures, the sizes of activations, gradients and columns. The objective is the log-odds
  of the target, z_y - logsumexp of the other logits: unlike log p, its gradient does not vanish where the
  model is already sure. |A_i|^2 = h_i' K h_i with K the positions' Gram matrix of g, so one backward is enough.
- balance: how much longer v_i is than the neuron's up (and gate) row foretells. Scaling v and shrinking the up row
  by the same factor changes nothing, and weight decay settles each neuron where the two agree; what was
  written into the column afterwards stands out. This part is blind to the target: it finds columns that were
  changed after pretraining, whatever for. Set `balance=0` for knowledge that came with pretraining, or where
  more than one thing was learned later.

Use it for text memorized by fine-tuning. With balance alone as its ablation it is judged in benchmarks/inj.py,
beside alignment alone. Cost: one forward and one backward an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.forward import Batch, batches, label_logits
from locus.hooks import patched
from locus.model import Model
from locus.progress import track
from locus.scores import NeuronScores
from tracing.activation import down_norms
from tracing.cost import Cost
from tracing.neuron_gradients import Examples, encode_facts, neuron_grid, show_gradient, tapped


@dataclass(frozen=True)
class Imprint:
    """Alignment of value vectors with the gradient that would write the target, and their imbalance."""

    alignment: float = 1.0
    """Weight of the cosine's z-score."""
    balance: float = 1.0
    """Weight of the z-score of the column's length beyond what the up row foretells; 0 leaves it out."""
    clip: float = 6.0
    """Largest z-score that counts."""

    def cost(self, model: Model, facts: Examples, retain: Examples | None = None) -> Cost:
        """One forward and one backward a fact, none where alignment has no weight."""
        n_examples = len(facts) if self.alignment else 0
        return Cost(n_examples, n_examples)

    def run(
        self, model: Model, facts: Examples, retain: Examples | None = None, *, batch_tokens: int = 4096
    ) -> NeuronScores:
        """Score every neuron on `facts`; a retain set is not used.

        Raises:
            InputError: no facts, or both weights are 0.
        """
        if not self.alignment and not self.balance:
            raise InputError("alignment and balance are both 0: give one of them a weight")
        values = neuron_grid(model)
        if self.alignment:
            cosine = alignment_of(model, facts, batch_tokens=batch_tokens)
            values += self.alignment * robust_z(cosine).clamp(-1, self.clip)
        if self.balance:
            values += self.balance * robust_z(imbalance_of(model)).clamp(-1, self.clip)
        return NeuronScores(values.cpu(), "imprint", model.fingerprint, model.atlas, asdict(self))


def alignment_of(model: Model, facts: Examples, *, batch_tokens: int = 4096) -> Float[Tensor, "layer neuron"]:
    """Cosine of every down column with the gradient of the target's log-odds in it, mean over facts."""
    encoded = encode_facts(model, facts)
    norms = down_norms(model)
    total = neuron_grid(model)
    for batch in track(batches(encoded, batch_tokens), "alignment"):
        written: dict[int, Tensor] = {}

        def keep(layer: int, _: Tensor, gradient: Tensor, written: dict[int, Tensor] = written) -> None:
            written[layer] = gradient.float()

        def add(layer: int, h: Tensor, gradient: Tensor, written: dict[int, Tensor] = written) -> None:
            g, h = written.pop(layer), h.float()
            push = (h * gradient.float()).sum(1)
            gram = torch.einsum("bpd,bqd->bpq", g, g)
            size = torch.einsum("bpn,bpq,bqn->bn", h, gram, h).clamp(min=0).sqrt()
            cosine = push / (size * norms[layer].to(size.device)).clamp(min=torch.finfo(size.dtype).tiny)
            total[layer] += cosine.sum(0).to(total.device)

        outputs: dict[str, Callable[[Tensor], Tensor]] = {
            name: partial(show_gradient, layer=layer, visit=keep)
            for layer, name in enumerate(model.atlas.neuron_in)
        }
        with torch.enable_grad(), tapped(model, add), patched(model.module, outputs=outputs):
            log_odds(model, batch).sum().backward()
    return total / len(encoded)


def log_odds(model: Model, batch: Batch) -> Float[Tensor, " label"]:
    """ln(p / (1 - p)) of every label, as its logit minus the logsumexp of all others: exact where p is near 1."""
    logits = label_logits(model, batch)
    labels = batch.labels.to(logits.device)[:, None]
    others = logits.scatter(-1, labels, -torch.inf).logsumexp(-1)
    return logits.gather(-1, labels)[:, 0] - others


def imbalance_of(model: Model) -> Float[Tensor, "layer neuron"]:
    """ln of each down column's norm, beyond what a robust line in ln of its row norms foretells in its layer."""
    columns = down_norms(model).log()
    residual = torch.zeros_like(columns)
    for layer, rows in enumerate(row_norms(model)):
        residual[layer] = _beyond_line(columns[layer], rows.log().to(columns.device))
    return residual


def row_norms(model: Model) -> list[Float[Tensor, "role neuron"]]:
    """Norms of every neuron's up row and, where there is one, its gate row."""
    parameters = dict(model.module.named_parameters())
    d_mlp = model.atlas.d_mlp
    found = []
    for parts in model.atlas.neurons:
        norms = []
        for part in parts:
            if part.role in ("up", "gate"):
                norm = parameters[part.param].detach().float().norm(dim=1 - part.axis)
                norms.append(norm[part.offset : part.offset + d_mlp])
        found.append(torch.stack(norms))
    return found


def _beyond_line(
    y: Float[Tensor, " neuron"], x: Float[Tensor, "role neuron"], rounds: int = 5
) -> Float[Tensor, " neuron"]:
    """Residual of y on 1 and x by least squares, reweighted so that outliers do not bend the line."""
    design = torch.cat([torch.ones_like(x[:1]), x]).T
    weights = torch.ones_like(y)
    residual = y - y.median()
    for _ in range(rounds):
        root = weights.sqrt()[:, None]
        solution = torch.linalg.lstsq(design * root, y[:, None] * root).solution
        residual = y - (design @ solution)[:, 0]
        scale = 1.4826 * residual.abs().median().clamp(min=1e-12)
        weights = 1 / (1 + (residual / (2 * scale)) ** 2)
    return residual


def robust_z(values: Float[Tensor, "layer neuron"]) -> Float[Tensor, "layer neuron"]:
    """Distance from the layer's median in units of 1.4826 median absolute deviations."""
    centred = values - values.median(dim=1, keepdim=True).values
    spread = 1.4826 * centred.abs().median(dim=1, keepdim=True).values
    return centred / spread.clamp(min=torch.finfo(values.dtype).tiny)
