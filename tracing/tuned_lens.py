"""Tuned lens: the logit lens with a learned affine correction for each layer (Belrose et al. 2023).

    lens_l(h) = unembed(final_norm(h + A_l h + b_l))
A_l and b_l start at zero, where the tuned lens is the logit lens, and are trained to bring the lens distribution to
the model's final one: the loss is KL(final || lens_l), mean over positions (arXiv:2303.08112). Optimizer as in the
paper: SGD with Nesterov momentum 0.9, learning rate 1 - 0.9, weight decay 1e-3, linear decay to 0; gradients are
clipped. The last layer's output is the final one and has no translator.

A lens belongs to the model it was trained for and refuses another one. Training can be killed and goes on where it
was: `TunedLensTraining.run(..., folder=...)`. Cost: a forward of the model and, for each layer, an unembedding
forward and backward of every position: for a small model with a large vocabulary that is the greater part.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.files.schema import understood
from locus.hooks import record
from locus.lens import LensScores, lens_logits
from locus.metrics import kl_divergence
from locus.model import Model
from locus.progress import task
from locus.tokens import Encoded, encode_text
from tracing.localizer import Cost

_STATE = "tuned-lens-training.safetensors"


@dataclass(frozen=True)
class TunedLens:
    """Translators of one model, a layer each but for the last."""

    matrices: Float[Tensor, "layer d_model d_model"]
    """A_l: added to the identity."""
    biases: Float[Tensor, "layer d_model"]
    """b_l."""
    fingerprint: str
    """Of the model it was trained for."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was trained."""

    @classmethod
    def untrained(cls, model: Model) -> TunedLens:
        """All zero: the logit lens."""
        n_layers, d_model = model.atlas.n_layers - 1, model.atlas.d_model
        return cls(torch.zeros(n_layers, d_model, d_model), torch.zeros(n_layers, d_model), model.fingerprint)

    def translate(
        self, hidden: Float[Tensor, "*batch d_model"], layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """States after a layer as the last layer would give them; the last layer's own stay."""
        if layer >= len(self.matrices):
            return hidden
        matrix, bias = self.matrices[layer].to(hidden.device), self.biases[layer].to(hidden.device)
        moved = hidden.float() + hidden.float() @ matrix.T + bias
        return moved.to(hidden.dtype)

    def logits(
        self, model: Model, hidden: Float[Tensor, "*batch d_model"], layer: int
    ) -> Float[Tensor, "*batch d_vocab"]:
        """What the model would say after this layer, through its translator; float32.

        Raises:
            InputError: the lens was trained for another model.
        """
        self.check(model)
        return lens_logits(model, self.translate(hidden, layer))

    def check(self, model: Model) -> None:
        """Refuse any model but the one it was trained for.

        Raises:
            InputError: another fingerprint.
        """
        if self.fingerprint != model.fingerprint:
            raise InputError(
                f"this tuned lens was trained for another model ({self.fingerprint[:12]}) than {model.name} "
                f"({model.fingerprint[:12]}): train one for it, or use the logit lens"
            )

    def save(self, path: str | Path) -> None:
        """Write kind "tuned-lens"."""
        tensors = {"matrices": self.matrices.contiguous(), "biases": self.biases.contiguous()}
        meta = {"fingerprint": self.fingerprint, "settings": self.settings}
        save_tensors(Path(path), "tuned-lens", tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """Read what `save` wrote. Raises InputError for anything else."""
        tensors, meta = load_tensors(Path(path), "tuned-lens")
        with understood(path, "tuned lens", "train it again"):
            return cls(tensors["matrices"], tensors["biases"], meta["fingerprint"], meta["settings"])


@torch.no_grad()
def tuned_scores(model: Model, lens: TunedLens, encoded: Sequence[Encoded]) -> LensScores:
    """Rank and probability of each first target token after every block, at the last prompt position.

    Raises:
        InputError: the lens was trained for another model.
    """
    lens.check(model)
    shape = (len(encoded), model.atlas.n_layers)
    rank, bottom = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    prob = torch.zeros(shape)
    for i, one in enumerate(encoded):
        states = _states(model, one.prompt_ids)
        for layer, state in enumerate(states):
            logits = lens.logits(model, state[-1], layer)
            own = logits[one.target_ids[0]]
            rank[i, layer], bottom[i, layer] = int((logits > own).sum()), int((logits < own).sum())
            prob[i, layer] = float(logits.softmax(-1)[one.target_ids[0]])
    return LensScores(rank, bottom, prob)


@dataclass(frozen=True)
class TunedLensTraining:
    """How translators are trained."""

    steps: int = 250
    """Optimizer steps."""
    tokens: int = 512
    """Positions per step."""
    learning_rate: float = 0.1
    """At the start; falls linearly to 0. The paper's 1.0 * (1 - momentum)."""
    momentum: float = 0.9
    """Nesterov's."""
    weight_decay: float = 1e-3
    """Of matrices and biases."""
    clip: float = 1.0
    """Longest gradient of all translators together; 0 clips nothing. Some states are a hundred times longer than the
    others (the first token's), and a step that follows them overshoots for all."""
    block: int = 128
    """Longest piece of text, in tokens."""
    seed: int = 0
    """Of the order of the pieces."""

    def cost(self, model: Model) -> Cost:
        """Passes of one piece through the whole model; the unembeddings, a layer each, come on top."""
        return Cost(self.steps * self.tokens / self.block)

    def forget(self, folder: Path) -> None:
        """Remove the state of a training that is finished."""
        (folder / _STATE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()

    def run(
        self,
        model: Model,
        texts: Sequence[str],
        *,
        folder: Path | None = None,
        resume: bool = False,
        save_every: int = 25,
    ) -> TunedLens:
        """Train on free text.

        Args:
            model: Its weights stay as they are.
            texts: Paragraphs.
            folder: Where the training state is kept; None to keep none.
            resume: Go on from the state in `folder`, if there is one.
            save_every: Steps between two states.

        Raises:
            InputError: no text, or a state of another model or of other settings.
        """
        pieces = [one for text in texts for one in encode_text(model, text, self.block)]
        if not pieces:
            raise InputError("no text given: a tuned lens is trained on free text")
        lens = TunedLens.untrained(model)
        parameters = [
            lens.matrices.to(model.device).requires_grad_(),
            lens.biases.to(model.device).requires_grad_(),
        ]
        momenta = [torch.zeros_like(parameter) for parameter in parameters]
        start = self._resumed(model, folder, parameters, momenta) if resume and folder else 0
        with task("tuned lens", self.steps - start) as line:
            for step in range(start, self.steps):
                loss = self._accumulate(model, self._drawn(pieces, step), parameters)
                self._descend(parameters, momenta, self.learning_rate * (1 - step / self.steps))
                line.advance(note=f"KL {loss:.3f}")
                if folder is not None and (step + 1) % save_every == 0:
                    self._keep(model, folder, step + 1, parameters, momenta)
        matrices, biases = (parameter.detach().cpu() for parameter in parameters)
        return TunedLens(matrices, biases, model.fingerprint, asdict(self))

    def _drawn(self, pieces: Sequence[Encoded], step: int) -> list[Encoded]:
        """The pieces of one step: a function of seed and step alone, so that a resumed run draws the same."""
        order = random.Random(f"{self.seed}-{step}").sample(range(len(pieces)), len(pieces))
        drawn: list[Encoded] = []
        for index in order:
            if drawn and sum(len(one.ids) for one in drawn) + len(pieces[index].ids) > self.tokens:
                break
            drawn.append(pieces[index])
        return drawn

    def _accumulate(self, model: Model, pieces: Sequence[Encoded], parameters: Sequence[Tensor]) -> float:
        """Gradients of the mean KL over positions and layers; layer by layer, so that one's logits are held."""
        lens = TunedLens(parameters[0], parameters[1], model.fingerprint)
        n_layers, n_pos = len(parameters[0]), sum(len(one.ids) for one in pieces)
        total = 0.0
        for piece in pieces:
            with torch.no_grad():
                states = _states(model, piece.ids)
                final = lens_logits(model, states[-1])
            for layer in range(n_layers):
                with torch.enable_grad():
                    kl = kl_divergence(final, lens.logits(model, states[layer], layer)).sum() / n_pos
                kl.backward()
                total += float(kl.detach()) / n_layers
        return total

    @torch.no_grad()
    def _descend(self, parameters: Sequence[Tensor], momenta: Sequence[Tensor], rate: float) -> None:
        """SGD with Nesterov momentum and weight decay; written out so that its state is two plain tensors."""
        if self.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        for parameter, momentum in zip(parameters, momenta, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.add(parameter, alpha=self.weight_decay)
            momentum.mul_(self.momentum).add_(gradient)
            parameter.sub_(rate * gradient.add(momentum, alpha=self.momentum))
            parameter.grad = None

    def _keep(
        self, model: Model, folder: Path, step: int, parameters: Sequence[Tensor], momenta: Sequence[Tensor]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names = ("matrices", "biases", "matrices_momentum", "biases_momentum")
        tensors = {name: t.detach().cpu() for name, t in zip(names, (*parameters, *momenta), strict=True)}
        meta = {"fingerprint": model.fingerprint, "settings": asdict(self), "step": step}
        save_tensors(folder / _STATE, "tuned-lens-training", tensors, meta)

    def _resumed(
        self, model: Model, folder: Path, parameters: Sequence[Tensor], momenta: Sequence[Tensor]
    ) -> int:
        if not (folder / _STATE).exists():
            return 0
        tensors, meta = load_tensors(folder / _STATE, "tuned-lens-training")
        if meta["fingerprint"] != model.fingerprint or meta["settings"] != asdict(self):
            what = "another model" if meta["fingerprint"] != model.fingerprint else "other settings"
            raise InputError(f"{folder}: holds the training of a tuned lens with {what}; give another folder")
        names = ("matrices", "biases", "matrices_momentum", "biases_momentum")
        with torch.no_grad():
            for name, tensor in zip(names, (*parameters, *momenta), strict=True):
                tensor.copy_(tensors[name])
        return int(meta["step"])


def _states(model: Model, ids: Sequence[int]) -> list[Float[Tensor, "pos d_model"]]:
    """Output of every block."""
    with torch.no_grad(), record(model.module, outputs=model.atlas.blocks) as seen:
        model.module(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return [seen.outputs[name][0] for name in model.atlas.blocks]
