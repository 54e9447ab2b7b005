"""Linear probes: is the answer still linearly decodable from the hidden states of some layer.

A probe that is trained on the forgotten facts themselves would learn them anew. This one is trained on
retained facts only, as a ridge map from the hidden state at the last prompt position to the unembedding row of
the answer's first token, and must carry over to the forgotten ones. Its layer is chosen on held-out facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.audit.context import Context
from locus.audit.figure_values import Curve, FigureValues
from locus.audit.intervals import Items
from locus.audit.questions import Questions, questions_of
from locus.audit.state import State
from locus.fact import Example
from locus.forward import batches, label_logits
from locus.hooks import record
from locus.model import Model
from locus.tokens import Encoded

RIDGE = 1.0
MIN_TRAINING = 10


def run(state: State, context: Context) -> FigureValues:
    """Share of forget facts decoded by the probe of each layer; nothing without retained facts to train on."""
    forget, held_out = context.questions["forget"], context.questions.get("held_out")
    with state.active() as model:
        training = _training(model, context)
        if training is None or held_out is None:
            return FigureValues()
        rows = model.module.get_parameter(f"{model.atlas.unembed}.weight").detach().float().cpu()
        taught = last_states(model, training.encoded, context.max_tokens)
        tuned = last_states(model, held_out.encoded, context.max_tokens)
        tested = last_states(model, forget.encoded, context.max_tokens)
    answers = [first_targets(q.encoded) for q in (training, held_out, forget)]
    best = (-1.0, 0)
    decoded: list[Float[Tensor, " fact"]] = []
    for layer in range(taught.shape[1]):
        read = fit(taught[:, layer], rows[answers[0]])
        accuracy = hits(read(tuned[:, layer]), answers[1], rows)
        best = max(best, (float(accuracy.mean()), -layer))
        decoded.append(hits(read(tested[:, layer]), answers[2], rows))
    by_layer = tuple(Items(forget.facts, hit) for hit in decoded)
    curve = Curve("layer", tuple(map(float, range(len(by_layer)))), by_layer)
    return FigureValues({"probe.top1": by_layer[-best[1]]}, curves={"probe": curve})


def fit(
    states: Float[Tensor, "fact d_model"], wanted: Float[Tensor, "fact d_out"], ridge: float = RIDGE
) -> _Map:
    """Ridge regression in its dual form: exact with fewer facts than dimensions.

    Args:
        states: What is read.
        wanted: What should come out.
        ridge: Penalty in units of the states' mean squared norm.
    """
    mean, centre = states.mean(0), wanted.mean(0)
    x, y = (states - mean).double(), (wanted - centre).double()
    kernel = x @ x.T
    penalty = ridge * kernel.diagonal().mean().clamp_min(1e-12)
    dual = torch.linalg.solve(kernel + penalty * torch.eye(len(x), dtype=x.dtype), y)
    return _Map(mean, centre, (x.T @ dual).float())


class _Map:
    """An affine map."""

    def __init__(self, mean: Tensor, centre: Tensor, weight: Tensor) -> None:
        self.mean, self.centre, self.weight = mean, centre, weight

    def __call__(self, states: Float[Tensor, "fact d_model"]) -> Float[Tensor, "fact d_out"]:
        return (states - self.mean) @ self.weight + self.centre


def hits(
    read: Float[Tensor, "fact d_out"], answers: Int[Tensor, " fact"], rows: Float[Tensor, "d_vocab d_out"]
) -> Float[Tensor, " fact"]:
    """1 where the answer's row is the nearest in cosine among the rows of all the answers."""
    options = answers.unique()
    known = rows[options]
    known = torch.nn.functional.normalize(known - known.mean(0), dim=1)
    scores = torch.nn.functional.normalize(read - rows[options].mean(0), dim=1) @ known.T
    found: Tensor = options[scores.argmax(1)] == answers
    return found.float()


@torch.no_grad()
def last_states(
    model: Model, encoded: Sequence[Encoded], max_tokens: int
) -> Float[Tensor, "fact layer d_model"]:
    """The residual stream after every block at the last prompt position, float32 on the CPU."""
    out = torch.zeros(len(encoded), model.atlas.n_layers, model.atlas.d_model)
    cut = [
        Encoded(e.ids[: e.target_start + 1], e.target_start, None, e.tokens[: e.target_start + 1])
        for e in encoded
    ]
    for batch in batches(cut, max_tokens):
        with record(model.module, outputs=model.atlas.blocks) as seen:
            label_logits(model, batch)
        for layer, block in enumerate(model.atlas.blocks):
            states = seen.outputs[block].cpu()
            out[batch.example, layer] = states[batch.rows, batch.cols].float()
    return out


def first_targets(encoded: Sequence[Encoded]) -> Int[Tensor, " fact"]:
    """First token of each target."""
    return torch.tensor([e.target_ids[0] for e in encoded])


def _training(model: Model, context: Context) -> Questions | None:
    """Retained facts and their paraphrases, or None where they are too few."""
    pairs: list[tuple[str, Example]] = []
    for fact in context.retain:
        if not fact.held_out:
            pairs += [(fact.id, e) for e in (fact.example, *fact.paraphrase_examples)]
    return questions_of(model, pairs) if len(pairs) >= MIN_TRAINING else None
