"""The recorded runs that packed rows are computed against: of one question, or of several side by side.

Questions whose prompts differ in length share the blocks' recorded arguments where those of the shorter are the
beginning of those of the longer (rotary tables, masks, ALiBi: true of all whose positions mean the same in a
prompt of any length). Their keys and values stay their own: a sequence of packed rows belongs to one question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracing.patching.runs import PatchingQuestion
from tracing.patching.sites import Patch, Site
from tracing.replay.blocks import Blocks
from tracing.replay.packing import Track
from tracing.replay.recorded_runs import Runs


@dataclass
class ReplayContext:
    """What all batches of tracks of some questions share; all of them have the same number of draws."""

    questions: Sequence[PatchingQuestion]
    runs: Sequence[Runs]
    budget: int
    """Rows that go through a block at once."""
    blocks: Blocks
    """Of the longest question."""
    rows_run: list[int]
    """Rows times blocks so far, of each question."""

    @classmethod
    def of(cls, questions: Sequence[PatchingQuestion], runs: Sequence[Runs], budget: int) -> ReplayContext:
        """Put recorded questions side by side."""
        longest = max(runs, key=lambda r: r.recorded.blocks.n_pos)
        return cls(questions, runs, budget, longest.recorded.blocks, [r.rows_run for r in runs])

    @property
    def samples(self) -> int:
        """Draws of every question."""
        return self.questions[0].samples

    @property
    def n_layers(self) -> int:
        """Of the model."""
        return self.blocks.model.atlas.n_layers

    @property
    def device(self) -> torch.device:
        """Of the first block's input."""
        return self.runs[0].recorded.hidden[0].device

    def positions(self, track: Track) -> list[int]:
        """Where a track has rows: behind its last layer only where it is read."""
        question = self.questions[track.of]
        if track.entry >= self.n_layers:
            return [r for r in question.reads if r >= track.start]
        return list(range(track.start, question.n_pos))

    def base_hidden(
        self, layer: int, of: Int[Tensor, " row"], positions: Int[Tensor, " row"]
    ) -> Float[Tensor, "row sample d_model"]:
        """The base runs' inputs of a block at positions of several questions."""
        width = self.blocks.model.atlas.d_model
        first = self.runs[0].recorded.hidden[0]
        out = torch.empty(len(positions), self.samples, width, dtype=first.dtype, device=self.device)
        for i in of.unique().tolist():
            rows = (of == i).nonzero().flatten()
            hidden = self.runs[i].base.hidden(layer, positions[rows]).transpose(0, 1).to(out)
            out[rows] = hidden.expand(-1, self.samples, -1)
        return out

    def prefix(
        self, layer: int, of: Int[Tensor, " group"], n_base: int, n_other: int, draws: slice
    ) -> list[tuple[Tensor, Tensor]]:
        """Recorded keys and values that the sequences of one call attend to: the base runs' first `n_base`, then
        `n_other` of the other runs' from where they diverge. Where the sequences are of several questions, one
        row per sequence and draw, filled up with zeros that no row sees."""
        one = int(of[0])
        if bool((of == one).all()):
            runs = self.runs[one]
            start = runs.diverges
            return [
                *runs.base.keys(layer, 0, n_base, draws),
                *runs.other.keys(layer, start, start + n_other, draws),
            ]
        parts = []
        for base, n in ((True, n_base), (False, n_other)):
            if n == 0:
                continue
            found = {i: self._filled(layer, i, base, n, draws) for i in of.unique().tolist()}
            keys, values = (
                torch.stack([found[i][side] for i in of.tolist()]).flatten(0, 1) for side in (0, 1)
            )
            parts.append((keys, values))
        return parts

    def _filled(self, layer: int, of: int, base: bool, n: int, draws: slice) -> tuple[Tensor, Tensor]:
        runs, n_draws = self.runs[of], draws.stop - draws.start
        start, view = (0, runs.base) if base else (runs.diverges, runs.other)
        pieces = view.keys(layer, start, min(start + n, self.questions[of].n_pos), draws)
        whole = runs.recorded.keys[layer], runs.recorded.values[layer]
        filled = []
        for side in (0, 1):
            parts = [piece[side].expand(n_draws, -1, -1, -1) for piece in pieces]
            have = torch.cat(parts, dim=2) if parts else whole[side][:, :, :0].expand(n_draws, -1, -1, -1)
            filled.append(F.pad(have, (0, 0, 0, n - have.shape[2])))
        return filled[0], filled[1]

    def value(
        self, of: int, patch: Patch, site: Site, layer: int, positions: Int[Tensor, " k"], draws: slice
    ) -> Float[Tensor, "_ k _"]:
        """What a patch writes at each of these positions of one question, in all or in some of its draws."""
        runs = self.runs[of]
        if patch.source in ("other", "base"):
            view = runs.other if patch.source == "other" else runs.base
            return view.site(site, layer, positions, draws)
        if patch.source == "mean":
            return self.questions[of].means[site, layer].expand(1, len(positions), -1)
        return torch.zeros(1, len(positions), runs.width(site), device=self.device)


def side_by_side(runs: Sequence[Runs]) -> list[list[int]]:
    """Indices of the runs that can share calls, in groups: same draws, and arguments that begin alike."""
    groups: list[list[int]] = []
    for i in sorted(range(len(runs)), key=lambda i: -runs[i].recorded.blocks.n_pos):
        home = next((group for group in groups if _share(runs[group[0]], runs[i])), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return [sorted(group) for group in sorted(groups, key=min)]


def _share(long: Runs, short: Runs) -> bool:
    if long.samples != short.samples:
        return False
    n = short.recorded.blocks.n_pos
    return all(
        a.keys() == b.keys() and all(_begins(name, a[name], b[name], n) for name in a)
        for a, b in zip(long.recorded.blocks.arguments, short.recorded.blocks.arguments, strict=True)
    )


def _begins(name: str, long: Any, short: Any, n: int) -> bool:
    """Whether the first `n` positions of one argument are the other."""
    if name in ("hidden_states", "past_key_values", "past_key_value", "layer_past"):
        return True
    if name == "attention_mask":
        if isinstance(long, Tensor) and isinstance(short, Tensor):
            return torch.equal(long[..., :n, :n], short)
        return torch.equal(_seen(long, n), _seen(short, n))
    if name == "alibi" and isinstance(long, Tensor) and isinstance(short, Tensor):
        return torch.equal(long[..., :n], short)
    if isinstance(long, Tensor) and isinstance(short, Tensor):
        return torch.equal(long[:, :n], short)
    if isinstance(long, list | tuple) and isinstance(short, list | tuple):
        return len(long) == len(short) and all(_begins("", a, b, n) for a, b in zip(long, short, strict=True))
    return not isinstance(long, Mapping | Tensor) and not isinstance(short, Tensor) and bool(long == short)


def _seen(mask: Tensor | None, n: int) -> Bool[Tensor, "_ n n"]:
    """Which keys each query may see."""
    if mask is None:
        return torch.ones(1, n, n, dtype=torch.bool).tril()
    entries = mask[0, :, :n, :n].cpu()
    return entries if entries.dtype == torch.bool else entries == 0
