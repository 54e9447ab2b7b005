"""One step made by several processes: who computes what of it, and how their parts become one.

Every process takes a part of a step's examples. Losses are means over the whole step, so the parts' gradients add up
to the step's, and all processes make the same optimizer step. Of the model each holds either all or, sharded
(`locus.fsdp_loader`), a part:

- all of it, and all of the deltas: the gradients are summed once a step;
- a part: the deltas are sharded along, put together where they are used, and their gradients are summed and parted on
  the way back. Then all must make the same calls in the same order, so a process with fewer batches than another runs a
  short one for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from editors.training.data import Data, batched
from locus.errors import InputError
from locus.forward import Batch, TargetScores, batches, collate, measure
from locus.model import Model
from locus.parallel.ranks import ALONE, Ranks
from locus.parallel.sharding import full_tensor, is_sharded, reshard
from locus.tokens import Encoded


@dataclass(frozen=True)
class Piece:
    """A batch that this process computes."""

    batch: Batch
    counts: bool = True
    """False for one that is run only because the others run one."""


@dataclass(frozen=True)
class Team:
    """The processes of one training run, as one of them sees them."""

    ranks: Ranks = ALONE
    in_step: bool = False
    """Whether all must make the same calls in the same order: the model is sharded."""

    @classmethod
    def of(cls, ranks: Ranks, model: Model) -> Team:
        """The processes `ranks`, which hold `model`.

        Raises:
            InputError: the model is spread over processes that were not named, or was not read so from a checkpoint.
        """
        sharded = is_sharded(model.module)
        if sharded and model.folder is None:
            raise InputError(
                f"{model.name}: a sharded model is read from its checkpoint, by load_model with shard"
            )
        if sharded and ranks is ALONE:
            raise InputError(f"{model.name} is spread over several processes: give them as ranks")
        if sharded:
            reshard(model.module)
        return cls(ranks, sharded)

    def deal(self) -> Deal:
        """Begin to deal out what is to be computed."""
        return Deal(self)

    def any(self, here: bool) -> bool:
        """Whether this holds on any process, where all must do the same; else whether it holds here."""
        if not self.in_step:
            return here
        found = torch.tensor([float(here)])
        self.ranks.all_reduce([found])
        return bool(found)

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes; all of them call it."""
        if self.ranks.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.ranks.all_reduce([sums])
        return [float(one) for one in sums]

    def summed(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Give each parameter the sum of the processes' gradients; those that have one anywhere."""
        if self.ranks.size > 1 and not self.in_step:
            have = torch.tensor([float(p.grad is not None) for p in parameters])
            self.ranks.all_reduce([have])
            for parameter, count in zip(parameters, have.tolist(), strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.ranks.all_reduce([p.grad for p in parameters if p.grad is not None])
        return [p for p in parameters if p.grad is not None]

    def clip_(self, parameters: Sequence[nn.Parameter], most: float) -> Float[Tensor, ""]:
        """Shorten the gradient of all parameters together to at most this norm; its norm before that."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, most))

    def measure(self, model: Model, encoded: Sequence[Encoded], max_tokens: int) -> TargetScores:
        """`locus.forward.measure`, each process some of the examples; the same numbers on all of them."""
        if self.ranks.size == 1:
            return measure(model, encoded, max_tokens)
        found = torch.zeros(3, len(encoded))
        for piece in self.deal().pieces(encoded, batches(encoded, max_tokens), max_tokens):
            numbers = list(piece.batch.examples)
            scores = measure(model, [encoded[i] for i in numbers], max_tokens)
            if piece.counts:
                found[:, numbers] = torch.stack([scores.nll, scores.correct.float(), scores.first_prob])
        self.ranks.all_reduce([found])
        n_tokens = torch.tensor([one.n_target for one in encoded], dtype=torch.long)
        return TargetScores(found[0], n_tokens, found[1] > 0, found[2])

    def settle(self, data: Data, run: str) -> None:
        """Make sure that all were given the same run, and take the first one's numbers for the reference's."""
        probed = [list(one.ids) for one in data.probe]
        self.ranks.agree("facts, mask, model or settings", f"{run} {probed}")
        if self.ranks.size > 1:
            for scores in (data.reference, data.reworded.reference):
                if not self.ranks.first:
                    scores.nll.zero_()
                self.ranks.all_reduce([scores.nll])


BY_ITSELF = Team()
"""One process."""


class Deal:
    """What of a step falls to each process: whoever has the fewest tokens so far takes the next, longest first."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.loads = [0] * team.ranks.size

    def pieces(self, encoded: Sequence[Encoded], whole_step: Sequence[Batch], max_tokens: int) -> list[Piece]:
        """This process's part of some batches, in batches of its own."""
        ranks = self.team.ranks
        if ranks.size == 1:
            return [Piece(batch) for batch in whole_step]
        numbers = [number for batch in whole_step for number in batch.examples]
        parts = [list(batched(encoded, part, max_tokens)) for part in self._parts(encoded, numbers)]
        mine = [Piece(batch) for batch in parts[ranks.rank]]
        if self.team.in_step and (fewer := max(map(len, parts)) - len(mine)):
            shortest = min(numbers, key=lambda number: len(encoded[number].ids))
            mine += [Piece(collate(encoded, [shortest]), counts=False)] * fewer
        return mine

    def _parts(self, encoded: Sequence[Encoded], numbers: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in self.loads]
        for number in sorted(numbers, key=lambda number: (-len(encoded[number].ids), number)):
            idlest = self.loads.index(min(self.loads))
            parts[idlest].append(number)
            self.loads[idlest] += len(encoded[number].ids)
        return [sorted(part) for part in parts]
