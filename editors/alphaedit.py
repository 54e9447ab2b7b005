"""AlphaEdit: MEMIT's residuals, written only where text does not go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from editors.aim import Aim
from editors.least_squares import NullSpace, write_within
from editors.located import DownProjection, whole_projections
from editors.others import facts_for
from editors.spread import Log, Spread
from editors.subject import Place
from locus.delta import WeightDelta
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model


@dataclass(frozen=True)
class AlphaEdit:
    """Null-space constrained editing (Fang et al. 2025, arXiv:2410.02355).

    Each layer's update is projected onto the directions in which keys over text hardly vary, so that text is
    kept by construction and the solve only weighs the facts: those of this batch, which are to move, those of
    earlier batches, which are to stay, and the update's own size.

    By default a fact is written over with guesses (`aim`): a refusal, the same for all, comes off all of them when a
    few are taught again (benchmarks/README.md, "Fresh facts").
    """

    layers: tuple[int, ...] = ()
    """Layers to edit, negative from the end; none for `most` of the mask's, nearest to a fifth of the depth."""
    most: int = 5
    """How many layers at most, where none are named."""
    aim: Aim = Aim(to="alternatives", lr=0.1, clamp=0.75)
    """What the model should say instead, and how the state that makes it say so is found."""
    threshold: float = 0.5
    """A direction counts as free when its eigenvalue is below this share of the mean one. (The paper's absolute
    2e-2 depends on the scale of a model's activations.)"""
    l2: float = 0.1
    """Weight of the update's size, as a share of the mean squared norm of the facts' keys in the null space."""
    rounds: int = 3
    """How often a fact is written at most: what the model still says after a round is written again."""
    washed: float = 0.01
    """A fact whose target has no more probability than this is not written again."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in the second moment."""
    moment_tokens: int = 100_000
    """Tokens of text that the second moment is taken over, at most."""
    batch: int = 0
    """Facts edited at once; 0 for all."""
    place: Place = "subject"
    """Edit at the last token of the subject or of the prompt."""
    batch_tokens: int = 4096
    """Padded tokens in one forward."""

    def own_mask(self, model: Model) -> WeightMask:
        """The down projections of the layers named, or of all: what may change where no mask is given."""
        return whole_projections(model, self.layers)

    def run(
        self,
        model: Model,
        forget: Sequence[Fact],
        retain: Sequence[Fact],
        mask: WeightMask,
        *,
        text: Sequence[str] = (),
        folder: Path | None = None,
        resume: bool = False,
        log: Log | None = None,
    ) -> WeightDelta:
        """Edit the facts, batch after batch; the model in memory ends bit for bit as it was.

        Keys of retain facts that are not held out count in the second moment; `text` is what the rest of it and the
        openings are taken from, by default the neutral text that comes with locus.

        Raises:
            InputError: no facts, a mask without down projections, a fact without a subject, or no free direction.
        """
        forget = facts_for(self.aim, forget, retain)
        spread = Spread.over(self, model, forget, retain, mask, text)
        spaces = {layer: NullSpace.of(moment, self.threshold) for layer, moment in spread.moments.items()}

        def solve(
            one: DownProjection, keys: Float[Tensor, "n fact"], residual: Float[Tensor, "d_model fact"]
        ) -> Float[Tensor, "d_model n"]:
            space = spaces[one.layer]
            size = float((space.basis.mT @ keys).square().sum(0).mean())
            return write_within(space, keys, residual, self.l2 * size, spread.written.earlier(one))

        with spread.borrowed():
            spread.write_(forget, self.batch, solve, log)
        return spread.delta(
            mask,
            free=[space.basis.shape[1] for space in spaces.values()],
            energy=[space.kept for space in spaces.values()],
        )
