"""Several processes share every optimizer step: which examples each computes, and how gradients are reduced.

Every process computes some of a step's examples. Losses are means over the whole step, so the processes' gradients add
up to the step's gradient, and every process takes the same optimizer step. There are two ways to hold the model:

- replicated: each process holds the whole model and all deltas; gradients are all-reduced once per step;
- sharded (FSDP2, `locus.fsdp_loader`): the deltas are sharded as the model is, unsharded where they are used, and their
  gradients are reduce-scattered in the backward pass. All processes must then make the same calls in the same order, so
  a process with fewer batches than another runs a short batch whose loss has weight 0.
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
class BatchShare:
    """A batch that this process computes."""

    batch: Batch
    """Its examples are numbers in the list of the whole step."""
    counts: bool = True
    """False for a batch that is run only because other processes run one."""


@dataclass(frozen=True)
class Processes:
    """The processes of one training run, seen from one of them."""

    ranks: Ranks = ALONE
    """This process's rank, and its collectives."""
    sharded: bool = False
    """Whether the model is sharded: all processes must then make the same calls in the same order."""

    @classmethod
    def of(cls, ranks: Ranks, model: Model) -> Processes:
        """The processes `ranks`, which hold `model`.

        Raises:
            InputError: the model is sharded and `ranks` is a single process, or was not loaded from a checkpoint.
        """
        sharded = is_sharded(model.module)
        if sharded and model.folder is None:
            raise InputError(
                f"{model.name}: a sharded model must be loaded from a checkpoint: load_model(..., shard=True)"
            )
        if sharded and ranks.size == 1:
            raise InputError(f"{model.name} is sharded over several processes: pass them as `ranks`")
        if sharded:
            reshard(model.module)
        return cls(ranks, sharded)

    def split(self) -> WorkSplit:
        """A new division of one step's examples among the processes."""
        return WorkSplit(self)

    def any(self, here: bool) -> bool:
        """Whether this holds on any process of a sharded model; of a replicated one, whether it holds here."""
        if not self.sharded:
            return here
        found = torch.tensor([float(here)])
        self.ranks.all_reduce([found])
        return bool(found)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes; all of them call it."""
        if self.ranks.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.ranks.all_reduce([sums])
        return [float(one) for one in sums]

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Sum each parameter's gradient over the processes; returns the parameters that have a gradient on any."""
        if self.ranks.size > 1 and not self.sharded:
            have = torch.tensor([float(p.grad is not None) for p in parameters])
            self.ranks.all_reduce([have])
            for parameter, count in zip(parameters, have.tolist(), strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.ranks.all_reduce([p.grad for p in parameters if p.grad is not None])
        return [p for p in parameters if p.grad is not None]

    def clip_(self, parameters: Sequence[nn.Parameter], most: float) -> Float[Tensor, ""]:
        """Clip the norm of the gradient of all parameters together; returns the norm before."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, most))

    def measure(self, model: Model, encoded: Sequence[Encoded], max_tokens: int) -> TargetScores:
        """`locus.forward.measure`, divided among the processes; every process gets all the scores."""
        if self.ranks.size == 1:
            return measure(model, encoded, max_tokens)
        found = torch.zeros(3, len(encoded))
        for piece in self.split().pieces(encoded, batches(encoded, max_tokens), max_tokens):
            numbers = list(piece.batch.examples)
            scores = measure(model, [encoded[i] for i in numbers], max_tokens)
            if piece.counts:
                found[:, numbers] = torch.stack([scores.nll, scores.correct.float(), scores.first_prob])
        self.ranks.all_reduce([found])
        n_tokens = torch.tensor([one.n_target for one in encoded], dtype=torch.long)
        return TargetScores(found[0], n_tokens, found[1] > 0, found[2])

    def agree(self, data: Data, run: str) -> None:
        """Check that all processes were given the same run; all take the first one's reference scores."""
        probed = [list(one.ids) for one in data.probe]
        self.ranks.agree("facts, mask, model or settings", f"{run} {probed}")
        if self.ranks.size > 1:
            for scores in (data.reference, data.reworded.reference):
                if not self.ranks.first:
                    scores.nll.zero_()
                self.ranks.all_reduce([scores.nll])


ONE_PROCESS = Processes()
"""A run in a single process."""


class WorkSplit:
    """Divides a step's examples: the process with the fewest tokens so far takes the next one, longest first."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.loads = [0] * processes.ranks.size

    def pieces(
        self, encoded: Sequence[Encoded], whole_step: Sequence[Batch], max_tokens: int
    ) -> list[BatchShare]:
        """This process's part of a step.

        Args:
            encoded: All examples.
            whole_step: The step's batches; `Batch.examples` are numbers in `encoded`.
            max_tokens: Padded tokens that one of this process's own batches may hold.
        """
        ranks = self.processes.ranks
        if ranks.size == 1:
            return [BatchShare(batch) for batch in whole_step]
        numbers = [number for batch in whole_step for number in batch.examples]
        parts = [list(batched(encoded, part, max_tokens)) for part in self._parts(encoded, numbers)]
        mine = [BatchShare(batch) for batch in parts[ranks.rank]]
        if self.processes.sharded and (fewer := max(map(len, parts)) - len(mine)):
            shortest = min(numbers, key=lambda number: len(encoded[number].ids))
            mine += [BatchShare(collate(encoded, [shortest]), counts=False)] * fewer
        return mine

    def _parts(self, encoded: Sequence[Encoded], numbers: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in self.loads]
        for number in sorted(numbers, key=lambda number: (-len(encoded[number].ids), number)):
            idlest = self.loads.index(min(self.loads))
            parts[idlest].append(number)
            self.loads[idlest] += len(encoded[number].ids)
        return [sorted(part) for part in parts]
