"""Causal traces: what restoring each state of a corrupted run gives back, saved, loaded and averaged.

A `FactTrace` is one fact's grid for every kind of state that was restored; a `Trace` is a set of them with the
settings they share. Both are plain values: whatever traced them, here they are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locus.atlas import Atlas
from locus.errors import InputError
from locus.files.artefact import load_json, load_tensors, save_json, save_tensors
from locus.files.schema import built, understood, value_of
from locus.scores import LayerScores

TOKEN_CLASSES = (
    "before_subject",
    "first_subject",
    "middle_subject",
    "last_subject",
    "first_subsequent",
    "further",
    "last_token",
)
"""Classes of prompt positions, after Meng et al. 2022 (arXiv:2202.05262). Each position is in exactly one."""

_SCALARS = ("clean_prob", "corrupted_prob", "clean_score", "corrupted_score")
_LARGEST = 1e30
"""No metric comes near it; what is above, or is no number, was not traced."""
_GRIDS = ("scores", "standard_error")


@dataclass(frozen=True)
class TracedSite:
    """A cell of a trace that says something of the fact."""

    layer: int
    position: int
    token: str
    share: float
    """What restoring it gives back, as a share of what the corruption took away."""


@dataclass(frozen=True)
class FactTrace:
    """Effect of restoring one clean state in a corrupted run, for one fact (Meng et al. 2022, arXiv:2202.05262).

    Positions are those of the prompt, the beginning-of-sequence token included; the target's are not traced.
    """

    fact_id: str
    prompt: str
    target: str
    tokens: tuple[str, ...]
    """The prompt's tokens, as text."""
    subject: tuple[int, int] | None
    """First position of the subject and the one after its last; None for a fact without a subject."""
    corrupted: tuple[int, ...]
    """Positions whose embeddings were corrupted: the subject's, or the whole prompt's where there is none."""
    scores: Mapping[str, Float[Tensor, "layer pos"]]
    """Kind of state -> the metric, mean over the draws, with that state restored."""
    standard_error: Mapping[str, Float[Tensor, "layer pos"]]
    """Kind of state -> standard error of that mean over the draws; 0 for a single draw."""
    clean_prob: float
    """Probability of the target in the clean run."""
    corrupted_prob: float
    """Probability of the target with nothing restored, mean over the draws."""
    clean_score: float
    """The metric in the clean run; equals `clean_prob` for the metric "prob"."""
    corrupted_score: float
    """The metric with nothing restored, mean over the draws."""
    seed: int
    """Seed of this fact's draws, made of the run's seed and the fact's id."""
    samples: int
    """Draws of the corruption."""
    patched_forwards: int
    """Patched forwards whose results stand in the grids (cells times draws)."""
    engine: str
    """"replay", or "plain" with the reason in brackets."""
    verified: Mapping[str, Bool[Tensor, "layer pos"]] = field(default_factory=dict)
    """Kind of state -> which scores are exact, where the others are first-order estimates; empty: all are."""
    rank_correlation: Mapping[str, float] = field(default_factory=dict)
    """Kind of state -> Spearman's correlation of estimated and exact scores over the verified cells."""
    work: Mapping[str, float] = field(default_factory=dict)
    """What it took: "seconds", "tokens" run through the whole model (a token through half of the blocks is half
    a token), "flops" of their matrix products, "peak_bytes" of memory, the machine's
    "matrix_peak_flops_per_second". Not part of the artefact's tensors: it differs from run to run."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of state that were restored."""
        return tuple(self.scores)

    @property
    def total_effect(self) -> float:
        """What the corruption took away: clean minus corrupted."""
        return self.clean_score - self.corrupted_score

    def indirect_effect(self, kind: str) -> Float[Tensor, "layer pos"]:
        """What restoring one state gives back: restored minus corrupted."""
        return self.scores[kind] - self.corrupted_score

    def early_site(self, kind: str) -> TracedSite | None:
        """Where the subject's tokens give most back (ROME's early site): the best cell among its positions.

        None without a subject, for a subject that ends the prompt, and where the corruption took nothing away.
        """
        if self.subject is None or self.subject[1] >= len(self.tokens):
            return None
        start, stop = self.subject
        grid = self.indirect_effect(kind)[:, start:stop]
        layer, offset = divmod(int(grid.argmax()), stop - start)
        return self._site(kind, layer, start + offset)

    def late_site(self, kind: str) -> TracedSite | None:
        """Where the last token gives it back (ROME's late site).

        For block outputs the first layer behind which the last token alone gives back at least half; behind the last
        layer it gives back everything, whatever the fact, so that layer does not count. For what attention or an MLP
        writes the best layer. None where there is no such layer, or the corruption took nothing away.
        """
        grid = self.indirect_effect(kind)[:, -1]
        if not kind.startswith("block"):
            return self._site(kind, int(grid.argmax()), len(self.tokens) - 1)
        enough = (grid[:-1] >= 0.5 * self.total_effect).nonzero().flatten()
        return self._site(kind, int(enough[0]), len(self.tokens) - 1) if len(enough) else None

    def _site(self, kind: str, layer: int, position: int) -> TracedSite | None:
        if not self.total_effect > 0:
            return None
        share = float(self.indirect_effect(kind)[layer, position]) / self.total_effect
        return TracedSite(layer, position, self.tokens[position], share)

    def token_classes(self) -> tuple[str, ...]:
        """Class of each prompt position, one of `TOKEN_CLASSES`.

        A subject of one token is its last token. A subject that ends the prompt leaves no "last_token".
        Without a subject every position but the last is "further".
        """
        n = len(self.tokens)
        classes = ["further"] * (n - 1) + ["last_token"]
        if self.subject is not None:
            start, stop = self.subject
            classes[:start] = ["before_subject"] * start
            if stop < n - 1:
                classes[stop] = "first_subsequent"
            classes[start:stop] = ["middle_subject"] * (stop - start)
            classes[start], classes[stop - 1] = "first_subject", "last_subject"
        return tuple(classes)

    def save(self, path: str | Path) -> None:
        """Write this fact alone (kind "fact-trace"), atomically."""
        tensors, meta = _encode(self)
        save_tensors(Path(path), "fact-trace", tensors, {"fact": meta, "work": dict(self.work)})

    @classmethod
    def load(cls, path: str | Path) -> FactTrace:
        """Read what `save` wrote. Raises InputError for anything else."""
        tensors, meta = load_tensors(Path(path), "fact-trace")
        with understood(path, "trace of a fact", "remove it, and trace again"):
            return _decode(meta["fact"], tensors, meta["work"])


@dataclass(frozen=True)
class Trace:
    """The traces of a set of facts, and how they were made.

    Iterating gives the facts; `trace["id"]` is one of them.
    """

    facts: tuple[FactTrace, ...]
    settings: Mapping[str, Any]
    """The tracer's hyperparameters, and the noise they came to."""
    fingerprint: str
    """Fingerprint of the model that was traced."""
    atlas: Atlas
    """Names and shapes of that model's parts."""
    model: str
    """The model as the user called it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries it was computed with, and the device."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Digests of what it was made from (`locus.input_digest`): "model" by parts, with its dtype and attention
    implementation, and "facts" by id. Empty where an earlier version wrote it."""

    def __len__(self) -> int:
        return len(self.facts)

    def __iter__(self) -> Iterator[FactTrace]:
        return iter(self.facts)

    def __getitem__(self, fact_id: str) -> FactTrace:
        for fact in self.facts:
            if fact.fact_id == fact_id:
                return fact
        raise KeyError(fact_id)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of state that were restored."""
        return self.facts[0].kinds if self.facts else ()

    @property
    def work(self) -> dict[str, float]:
        """What all the facts took together; for peaks the largest."""
        total: dict[str, float] = {}
        for fact in self.facts:
            for key, value in fact.work.items():
                old = total.get(key, 0.0)
                total[key] = max(old, value) if "peak" in key else old + value
        return total

    @property
    def speed(self) -> dict[str, float]:
        """`work`, with the rates that follow: tokens and operations a second, and the latter as a fraction of what the
        machine's matrix products do at best."""
        work = self.work
        seconds, peak = work.get("seconds", 0.0), work.get("matrix_peak_flops_per_second", 0.0)
        if seconds > 0:
            work |= {f"{k}_per_second": work[k] / seconds for k in ("tokens", "flops") if k in work}
        if peak > 0 and "flops_per_second" in work:
            work["fraction_of_matrix_peak"] = work["flops_per_second"] / peak
        return work

    @property
    def engines(self) -> list[str]:
        """The engines that answered, as each fact names its own."""
        return sorted({fact.engine for fact in self.facts})

    @property
    def patched_forwards(self) -> int:
        """Patched forwards whose results stand in the grids, over all facts."""
        return sum(fact.patched_forwards for fact in self.facts)

    def average(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Average indirect effect (AIE) by kind, token class and layer, with 95 % bands.

        A fact's value is the mean over its positions of that class, so that facts count alike whatever their
        length; the band is 1.96 · sd / √n over the n facts that have such a position, 0 where n is 1.

        Returns:
            kind -> token class -> {"effect": a value per layer, "band": a value per layer, "n": facts}.
        """
        out: dict[str, dict[str, dict[str, Any]]] = {}
        for kind in self.kinds:
            out[kind] = {}
            for name in TOKEN_CLASSES:
                rows = [
                    fact.indirect_effect(kind).double()[:, chosen].mean(dim=1)
                    for fact in self.facts
                    if any(chosen := [c == name for c in fact.token_classes()])
                ]
                if rows:
                    effect, band = _mean_and_band(torch.stack(rows))
                    out[kind][name] = {"effect": effect.tolist(), "band": band.tolist(), "n": len(rows)}
        return out

    def average_total(self) -> dict[str, float]:
        """Means over facts: clean and corrupted score, total effect, and the 95 % band of the latter."""
        effects = torch.tensor([[f.total_effect] for f in self.facts], dtype=torch.float64)
        mean, band = _mean_and_band(effects)
        n = max(1, len(self.facts))
        return {
            "clean_score": sum(f.clean_score for f in self.facts) / n,
            "corrupted_score": sum(f.corrupted_score for f in self.facts) / n,
            "total_effect": float(mean),
            "total_effect_band": float(band),
            "n": len(self.facts),
        }

    def layer_scores(self, kind: str = "mlp", token_class: str = "last_subject") -> LayerScores:
        """The average indirect effect of each layer at one class of tokens, as scores for choosing weights.

        Args:
            kind: A kind that was traced.
            token_class: One of `TOKEN_CLASSES`; facts without such a position do not count. Where no fact has
                one (no subjects at all) the last token stands in.

        Raises:
            InputError: that kind was not traced, or no such token class.
        """
        if kind not in self.kinds:
            raise InputError(f"{kind!r} was not traced; traced: {', '.join(self.kinds) or 'nothing'}")
        if token_class not in TOKEN_CLASSES:
            raise InputError(f"token class {token_class!r}: not one of {', '.join(TOKEN_CLASSES)}")
        average = self.average()[kind]
        used = token_class if token_class in average else "last_token"
        values = torch.tensor(average[used]["effect"], dtype=torch.float32)
        settings = {**self.settings, "kind": kind, "token_class": used}
        return LayerScores(values, "causal-trace", self.fingerprint, self.atlas, settings)

    def save(self, folder: str | Path) -> None:
        """Write trace.safetensors, trace.json and average.json into a folder, each atomically.

        trace.json is for people and scripts: the facts with their tokens, which engine answered, how many patched
        forwards that were, and under `timing` tokens, seconds, tokens per second and the fraction of the machine's
        matrix peak, of all facts and of each. Everything but `timing` is the same, byte for byte, when the same
        facts are traced again with the same settings on the same machine, interrupted and resumed or not.
        """
        folder = Path(folder)
        about = self._about()
        tensors: dict[str, Tensor] = {}
        facts = []
        for fact in self.facts:
            own, meta = _encode(fact)
            tensors |= {f"{fact.fact_id}/{name}": tensor for name, tensor in own.items()}
            facts.append(meta)
        save_tensors(folder / "trace.safetensors", "trace", tensors, {**about, "facts": facts})
        timing = {"total": self.speed, "facts": {f.fact_id: dict(f.work) for f in self.facts}}
        scored = [
            {**meta, **{name: getattr(fact, name) for name in _SCALARS}}
            for meta, fact in zip(facts, self.facts, strict=True)
        ]
        info = {**about, "engine": self.engines, "patched_forwards": self.patched_forwards}
        save_json(folder / "trace.json", "trace-info", {**info, "facts": scored, "timing": timing})
        average = {"total": self.average_total(), "kinds": self.average()}
        save_json(folder / "average.json", "trace-average", average)

    @classmethod
    def load(cls, folder: str | Path) -> Trace:
        """Read what `save` wrote; a path to trace.safetensors does as well.

        Raises:
            InputError: missing, truncated, of another kind or of a newer version.
        """
        path = Path(folder)
        path = path if path.suffix == ".safetensors" else path / "trace.safetensors"
        tensors, meta = load_tensors(path, "trace")
        info = path.with_name("trace.json")
        timing = load_json(info, "trace-info") if info.exists() else {"timing": {"facts": {}}}
        with understood(info, "trace", "trace again"):
            work = timing["timing"]["facts"]
            value_of(Mapping[str, Mapping[str, float]], work, "timing.facts")
        with understood(path, "trace", "trace again"):
            facts = []
            for about in meta["facts"]:
                prefix = f"{about['fact_id']}/"
                own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                facts.append(_decode(about, own, work.get(about["fact_id"], {})))
            if len({fact.kinds for fact in facts}) > 1:
                raise InputError("its facts were traced for different kinds of states")
            names = {name: value_of(str, meta[name], name) for name in ("fingerprint", "model")}
            settings = value_of(Mapping[str, Any], meta["settings"], "settings")
            versions = value_of(Mapping[str, str], meta.get("versions", {}), "versions")
            atlas = Atlas.from_json(meta["atlas"])
            inputs = value_of(Mapping[str, Any], meta.get("inputs", {}), "inputs")
            return cls(tuple(facts), settings, atlas=atlas, versions=versions, inputs=inputs, **names)

    def _about(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "fingerprint": self.fingerprint,
            "atlas": self.atlas.to_json(),
            "model": self.model,
            "versions": dict(self.versions),
            "inputs": dict(self.inputs),
        }


def _mean_and_band(rows: Float[Tensor, "fact layer"]) -> tuple[Tensor, Tensor]:
    n = len(rows)
    if n == 0:
        return torch.zeros(rows.shape[1]), torch.zeros(rows.shape[1])
    sd = rows.std(dim=0) if n > 1 else torch.zeros_like(rows[0])
    return rows.mean(dim=0), 1.96 * sd / n**0.5


def _encode(fact: FactTrace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of one fact; `work` is in neither."""
    tensors = {name: torch.tensor(getattr(fact, name), dtype=torch.float64) for name in _SCALARS}
    for name in _GRIDS:
        tensors |= {f"{kind}/{name}": grid.float().contiguous() for kind, grid in getattr(fact, name).items()}
    tensors |= {f"{kind}/verified": grid.contiguous() for kind, grid in fact.verified.items()}
    meta = {
        "fact_id": fact.fact_id,
        "prompt": fact.prompt,
        "target": fact.target,
        "tokens": list(fact.tokens),
        "subject": None if fact.subject is None else list(fact.subject),
        "corrupted": list(fact.corrupted),
        "kinds": list(fact.kinds),
        "seed": fact.seed,
        "samples": fact.samples,
        "patched_forwards": fact.patched_forwards,
        "engine": fact.engine,
        "rank_correlation": dict(fact.rank_correlation),
    }
    return tensors, meta


def _decode(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], work: Mapping[str, float]) -> FactTrace:
    def grids(name: str) -> dict[str, Tensor]:
        return {kind: tensors[f"{kind}/{name}"] for kind in meta["kinds"] if f"{kind}/{name}" in tensors}

    scalars = {name: float(tensors[name]) for name in _SCALARS}
    told = {key: value for key, value in meta.items() if key != "kinds"}
    read = {**told, **scalars, "scores": {}, "standard_error": {}, "verified": {}, "work": work}
    fact = built(FactTrace, read)
    size = len(fact.tokens)
    start, stop = fact.subject or (0, 1)
    if not (0 <= start < stop <= size and all(0 <= p < size for p in fact.corrupted)):
        raise InputError(f"fact {fact.fact_id[:60]!r}: its subject is not among its {size} tokens")
    finite = all(abs(value) < _LARGEST for value in scalars.values())
    finite &= all(bool((grid.abs() < _LARGEST).all()) for grid in grids("scores").values())
    shapes = {tuple(grid.shape[1:]) for name in (*_GRIDS, "verified") for grid in grids(name).values()}
    if shapes != {(size,)} or not finite:
        raise InputError(
            f"fact {fact.fact_id[:60]!r}: a grid does not fit its {size} tokens, or is not finite"
        )
    return replace(
        fact, scores=grids("scores"), standard_error=grids("standard_error"), verified=grids("verified")
    )
