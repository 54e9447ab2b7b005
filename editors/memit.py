"""MEMIT: many facts at once, spread over several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from editors.aim import Aim
from editors.least_squares import Metric, write
from editors.located import DownProjection, whole_projections
from editors.others import facts_for
from editors.spread import Log, Spread
from editors.subject import Place
from locus.delta import WeightDelta
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model


@dataclass(frozen=True)
class MEMIT:
    """Mass-editing memory in a transformer (Meng et al. 2023, arXiv:2210.07229).

    Each layer's update is R Kᵀ (λ C + K Kᵀ)⁻¹: nearly what the facts' keys K are to become (the residuals R), at
    least cost to the text's second moment C. Facts edited in an earlier batch take part with a residual of zero.
    Where the mask holds only some neurons of a layer, keys and metric are those of these neurons.

    By default a fact is written over with guesses (`aim`): a refusal, the same for all, comes off all of them when a
    few are taught again.
    """

    layers: tuple[int, ...] = ()
    """Layers to edit, negative from the end; none for `most` of the mask's, nearest to a fifth of the depth."""
    most: int = 5
    """How many layers at most, where none are named."""
    aim: Aim = Aim(to="alternatives", lr=0.1, clamp=0.75)
    """What the model should say instead, and how the state that makes it say so is found."""
    weight: float = 0.1
    """λ, as a share of the number of neurons a layer (the paper's 15,000 for GPT-J is 0.92)."""
    rounds: int = 3
    """How often a fact is written at most: what the model still says after a round is written again."""
    washed: float = 0.01
    """A fact whose target has no more probability than this is not written again."""
    retain_weight: float = 1.0
    """Weight of the retain facts' keys against the text's in C."""
    ridge: float = 1e-3
    """Added to C's diagonal, as a share of its mean."""
    moment_tokens: int = 100_000
    """Tokens of text that C is taken over, at most."""
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

        Keys of retain facts that are not held out count in C; `text` is what the rest of it and the openings are
        taken from, by default the neutral text that comes with locus.

        Raises:
            InputError: no facts, a mask without down projections, or a fact without a subject.
        """
        forget = facts_for(self.aim, forget, retain)
        spread = Spread.over(self, model, forget, retain, mask, text)
        metrics = {layer: Metric.of(moment, self.ridge) for layer, moment in spread.moments.items()}

        def solve(
            one: DownProjection, keys: Float[Tensor, "n fact"], residual: Float[Tensor, "d_model fact"]
        ) -> Float[Tensor, "d_model n"]:
            every, wanted = spread.written.with_earlier(one, keys, residual)
            return write(metrics[one.layer], every, wanted, self.weight * model.atlas.d_mlp)

        with spread.borrowed():
            spread.write_(forget, self.batch, solve, log)
        return spread.delta(mask, conditions=[one.condition for one in metrics.values()])
