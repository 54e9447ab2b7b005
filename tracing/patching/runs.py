"""A question to a model: two runs of one prompt, and what is read off at the end.

The base run is the one that is patched, the other run the one the values come from: corrupted and clean when
denoising, clean and corrupted when noising.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from tracing.patching.readout import Readout
from tracing.patching.sites import PatchedRun, Site


@dataclass(frozen=True)
class Inputs:
    """Token ids, some of whose embeddings are replaced."""

    ids: Int[Tensor, " pos"]
    positions: tuple[int, ...] = ()
    """Where the embeddings are replaced, ascending."""
    embeddings: Float[Tensor, "_ n d_model"] | None = None
    """By what: the embedding module's output is set to these, a row for each draw."""

    @property
    def samples(self) -> int:
        """Number of draws; 1 when nothing is replaced."""
        return 1 if self.embeddings is None else self.embeddings.shape[0]

    def embedded(
        self, output: Float[Tensor, "batch pos d_model"], draws: slice = slice(None)
    ) -> Float[Tensor, "batch pos d_model"]:
        """The embedding module's output with the replacements; the batch holds the draws, in turns."""
        if self.embeddings is None:
            return output
        new = self.embeddings[draws].to(output)
        out = output.clone()
        out[:, list(self.positions)] = new.repeat(output.shape[0] // new.shape[0], 1, 1)
        return out

    def first_changed(self) -> int:
        """The first replaced position, or the length where nothing is replaced."""
        return self.positions[0] if self.positions else len(self.ids)


@dataclass(frozen=True)
class PatchingQuestion:
    """Two runs, and the positions whose predictions count."""

    base: Inputs
    other: Inputs
    reads: tuple[int, ...]
    """Positions whose logits are read, ascending: the last of the prompt, and all but the last of the target."""
    means: Mapping[tuple[Site, int], Float[Tensor, " width"]] = field(default_factory=dict)
    """(site, layer) -> the value of patches whose source is "mean"."""

    def __post_init__(self) -> None:
        if self.base.ids.shape != self.other.ids.shape:
            raise ValueError(
                f"runs of {len(self.base.ids)} and {len(self.other.ids)} tokens cannot be patched into each other"
            )
        if len({self.base.samples, self.other.samples, 1}) > 2:
            raise ValueError(
                f"{self.base.samples} and {self.other.samples} draws: one run has 1 or both have the same"
            )

    @property
    def samples(self) -> int:
        """Number of draws of each cell."""
        return max(self.base.samples, self.other.samples)

    @property
    def n_pos(self) -> int:
        """Length of both runs."""
        return len(self.base.ids)

    def draws(self, chosen: slice) -> PatchingQuestion:
        """The same question with some of its draws."""
        return PatchingQuestion(_some(self.base, chosen), _some(self.other, chosen), self.reads, self.means)

    def reversed(self) -> PatchingQuestion:
        """Base and other exchanged: noising instead of denoising, or back."""
        return PatchingQuestion(self.other, self.base, self.reads, self.means)


def _some(inputs: Inputs, chosen: slice) -> Inputs:
    if inputs.embeddings is None or inputs.samples == 1:
        return inputs
    return Inputs(inputs.ids, inputs.positions, inputs.embeddings[chosen])


def divergence(question: PatchingQuestion) -> int:
    """First position where the runs may differ; before it every state of both is the same."""
    different = (question.base.ids != question.other.ids).nonzero().flatten()
    by_ids = int(different[0]) if len(different) else question.n_pos
    return min(by_ids, question.base.first_changed(), question.other.first_changed())


@dataclass(frozen=True)
class Asked:
    """A question, the patched forwards to answer, and what to read off them."""

    question: PatchingQuestion
    cells: Sequence[PatchedRun]
    readout: Readout


@dataclass(frozen=True)
class RunScores:
    """What an engine gives back: the scores of every run, and what they took."""

    base: Float[Tensor, "_ score"]
    other: Float[Tensor, "_ score"]
    """One row where the other run has one draw."""
    cells: Float[Tensor, "cell _ score"]
    tokens: float
    """Tokens run through the whole model; a token through half of the blocks is half a token."""

    def cell_mean(self) -> Float[Tensor, "cell score"]:
        """Mean over the draws."""
        return self.cells.mean(dim=1)
