"""How a prompt is corrupted: noise on the subject's embeddings, or other tokens in its place.

Every corruption replaces the embedding module's output at some positions, one replacement per draw. Draws come
from a generator seeded by the run's seed and the fact's id, one after the other, so that neither the order
of the facts nor the number of draws changes a draw.

Gaussian and uniform noise: Meng et al. 2022 (arXiv:2202.05262). Token swap (symmetric token replacement):
Zhang & Nanda 2024 (arXiv:2309.16042), who find that it keeps the prompt in distribution where noise does not.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact
from locus.model import Model
from locus.tokens import Encoded
from tracing.patching.runs import Inputs

Corruption = Literal["gaussian", "uniform", "swap", "mean", "prompt"]
CORRUPTIONS: tuple[Corruption, ...] = ("gaussian", "uniform", "swap", "mean", "prompt")


@dataclass(frozen=True)
class Prepared:
    """A fact, its tokens, and what of it is corrupted."""

    fact: Fact
    encoded: Encoded
    positions: tuple[int, ...]
    """Positions to corrupt: the subject's tokens; without a subject the whole prompt but its BOS."""
    seed: int
    """Of this fact's draws."""

    @property
    def ids(self) -> Int[Tensor, " pos"]:
        """What the model reads: the prompt, and the target but for its last token."""
        return torch.tensor(self.encoded.ids[:-1])

    @property
    def reads(self) -> tuple[int, ...]:
        """Positions that predict the target's tokens."""
        return tuple(range(self.encoded.target_start - 1, len(self.encoded.ids) - 1))

    @property
    def subject_ids(self) -> tuple[int, ...]:
        """Tokens at the corrupted positions."""
        return tuple(self.encoded.ids[p] for p in self.positions)


def prepare(fact: Fact, encoded: Encoded, bos: int | None, seed: int) -> Prepared:
    """Choose the positions to corrupt, and seed the fact's draws."""
    if encoded.subject is not None:
        positions = tuple(range(*encoded.subject))
    else:
        start = 1 if bos is not None and encoded.ids[0] == bos and encoded.target_start > 1 else 0
        positions = tuple(range(start, encoded.target_start))
    return Prepared(fact, encoded, positions, fact_seed(seed, fact.id))


def fact_seed(seed: int, fact_id: str) -> int:
    """A seed made of the run's and the fact's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{fact_id}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class Corrupter:
    """Corrupts the facts of one run; what it knows of all of them together is the noise's size and the donors."""

    corruption: Corruption
    sd: float
    """Standard deviation of the pooled subject embeddings, over all entries of the embedding module's output."""
    amplitude: float
    """Standard deviation of Gaussian noise, half-width of uniform noise."""
    mean: Float[Tensor, " d_model"]
    """Mean of the pooled subject embeddings."""
    facts: tuple[Prepared, ...]

    @classmethod
    def of(
        cls,
        model: Model,
        facts: Sequence[Prepared],
        corruption: Corruption,
        noise_multiple: float,
        noise_sd: float | None = None,
    ) -> Corrupter:
        """Pool the subject tokens of all facts, each occurrence counted, in order of the facts' ids.

        Args:
            model: Its embedding module gives the vectors.
            facts: All facts of the run; the pooled standard deviation depends on them and is kept with the trace.
            corruption: One of `CORRUPTIONS`.
            noise_multiple: Noise in units of the pooled standard deviation (Meng et al. 2022: 3).
            noise_sd: Noise as a number, instead of the multiple.

        Raises:
            InputError: an unknown corruption, or noise that is not positive.
        """
        if corruption not in CORRUPTIONS:
            raise InputError(f"corruption {corruption!r}: not one of {', '.join(CORRUPTIONS)}")
        ids = [i for p in sorted(facts, key=lambda p: p.fact.id) for i in p.subject_ids]
        pooled = embed(model, torch.tensor(ids)).double()
        sd = float(pooled.std()) if pooled.numel() > 1 else 0.0
        amplitude = noise_multiple * sd if noise_sd is None else noise_sd
        if corruption in ("gaussian", "uniform") and not amplitude > 0:
            raise InputError(f"noise of size {amplitude}: must be above zero")
        return cls(corruption, sd, amplitude, pooled.mean(dim=0).float(), tuple(facts))

    def provenance(self) -> dict[str, str]:
        """What a draw depends on beyond seed and noise: for borrowed tokens, a hash of all that can be borrowed."""
        if self.corruption not in ("swap", "prompt", "mean"):
            return {}
        lent = sorted(str((p.subject_ids, p.encoded.prompt_ids, p.encoded.target_ids)) for p in self.facts)
        return {"donors": hashlib.sha256("\n".join(lent).encode()).hexdigest()[:16]}

    def inputs(self, model: Model, prepared: Prepared, samples: int) -> Inputs:
        """The corrupted inputs of one fact, with up to `samples` draws.

        "mean" knows one draw only; "swap" and "prompt" as many as there are donors.

        Raises:
            InputError: no other fact of the run can lend its subject or its prompt.
        """
        generator = torch.Generator().manual_seed(prepared.seed)
        clean = embed(model, torch.tensor(prepared.subject_ids))
        match self.corruption:
            case "gaussian":
                draws = [torch.randn(clean.shape, generator=generator) for _ in range(samples)]
                new = clean + self.amplitude * torch.stack(draws)
            case "uniform":
                draws = [torch.rand(clean.shape, generator=generator) for _ in range(samples)]
                new = clean + self.amplitude * (2 * torch.stack(draws) - 1)
            case "mean":
                new = self.mean.expand(1, *clean.shape).clone()
            case "swap":
                lent = self._subjects(prepared, samples, generator)
                new = torch.stack([embed(model, torch.tensor(ids)) for ids in lent])
            case "prompt":
                return self._other_prompts(model, prepared, samples, generator)
        return Inputs(prepared.ids, prepared.positions, new)

    def _subjects(
        self, prepared: Prepared, samples: int, generator: torch.Generator
    ) -> list[tuple[int, ...]]:
        """Subjects of as many tokens from facts with other answers; else tokens drawn from all those subjects."""
        own = prepared.subject_ids
        others = sorted({p.subject_ids for p in self._donors(prepared)} - {own})
        fitting = [ids for ids in others if len(ids) == len(own)]
        if fitting:
            order = torch.randperm(len(fitting), generator=generator).tolist()
            return [fitting[i] for i in order[:samples]]
        pool = sorted({i for ids in others for i in ids} - set(own))
        if not pool:
            raise InputError(
                f"fact {prepared.fact.id!r}: no other fact lends a subject to swap in; give more facts, or another "
                "corruption"
            )
        drawn = torch.randint(len(pool), (samples, len(own)), generator=generator)
        return [tuple(pool[int(i)] for i in row) for row in drawn]

    def _donors(self, prepared: Prepared) -> list[Prepared]:
        """The facts with another answer, which alone take this fact's answer away; all where there are none."""
        target = prepared.encoded.target_ids
        differing = [p for p in self.facts if p.encoded.target_ids != target]
        if not differing and len(self.facts) > 1:
            warnings.warn(
                f"fact {prepared.fact.id!r}: every other fact has the same answer; what is swapped in suggests it too",
                stacklevel=2,
            )
        return differing or list(self.facts)

    def _other_prompts(
        self, model: Model, prepared: Prepared, samples: int, generator: torch.Generator
    ) -> Inputs:
        """Other facts' prompts of the same length before this fact's target, one per draw."""
        length = prepared.encoded.target_start
        own = prepared.encoded.prompt_ids
        donors = sorted(
            {p.encoded.prompt_ids for p in self._donors(prepared) if p.encoded.target_start == length}
            - {own},
            key=lambda ids: (sum(a != b for a, b in zip(ids, own, strict=True)), ids),
        )
        if not donors:
            raise InputError(
                f"fact {prepared.fact.id!r}: no other fact has a prompt of {length} tokens to patch from; give more "
                "facts, or another corruption"
            )
        nearest = donors[:samples]
        changed = [p for p in range(length) if any(ids[p] != own[p] for ids in nearest)]
        new = torch.stack([embed(model, torch.tensor([ids[p] for p in changed])) for ids in nearest])
        return Inputs(prepared.ids, tuple(changed), new)


@torch.no_grad()
def embed(model: Model, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    """What the embedding module makes of token ids (its scaling included), in float32 on the CPU."""
    module = model.module.get_submodule(model.atlas.embed)
    out: Tensor = module(ids.to(model.device)[None])[0]
    return out.float().cpu()
