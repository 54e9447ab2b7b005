"""`locus combine`: algebra of saved neuron scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from locus.cli.locate.command import ALL_PARTS, PartName
from locus.cli.options import Talking

How = Literal["rank-average", "minus", "normalize"]
CombineScale = Literal["rank", "z", "robust-z", "max"]


def combine(
    *scores: Path,
    out: Annotated[Path, Parameter(name=["--out", "-o"])],
    how: How = "rank-average",
    scale: CombineScale | None = None,
    weights: Annotated[tuple[float, ...], Parameter(consume_multiple=True)] = (),
    strength: float = 1.0,
    mask: Path | None = None,
    budget: str = "1%",
    per_layer: Annotated[bool, Parameter(negative="")] = False,
    parts: Annotated[tuple[PartName, ...], Parameter(consume_multiple=True)] = ALL_PARTS,
    talking: Talking = Talking(),
) -> None:
    """Combine neuron scores that `locus locate` saved: several localizers, or forget minus retain.

    Args:
        scores: Files of `locus locate --scores`, all of one model.
        out: The combined scores, a .safetensors file.
        how: rank-average: what the localizers agree on; minus: the first minus STRENGTH times the second (the same
            localizer on what must go and on what must stay); normalize: one file brought to a scale.
        scale: Bring each file to this scale first: rank (0 to 1), z, robust-z, or max (divided by the largest).
        weights: Of rank-average, one a file.
        strength: Of what is taken away.
        mask: Also write the mask of the best, to this file.
        budget: Of that mask: a fraction (1%, 0.01) or a count (300) of the neurons.
        per_layer: Take that many from each layer.
        parts: Which weights of a neuron: its key vectors (gate, up), its value vector (down).
    """
    from locus.errors import InputError
    from locus.scores import NeuronScores
    from tracing.score_algebra import minus, normalize, rank_average

    least, most = {"rank-average": (1, None), "minus": (2, 2), "normalize": (1, 1)}[how]
    if len(scores) < least or (most is not None and len(scores) > most):
        wanted = f"{least}" if most == least else f"at least {least}"
        raise InputError(f"--how {how}: {len(scores)} files of scores given, it takes {wanted}")
    if how == "normalize" and scale is None:
        raise InputError("--how normalize: to which scale? add --scale rank, z, robust-z or max")
    loaded = [NeuronScores.load(path) for path in scores]
    if scale is not None:
        loaded = [normalize(one, scale) for one in loaded]
    if how == "rank-average":
        made = rank_average(loaded, weights)
    elif how == "minus":
        made = minus(loaded[0], loaded[1], strength)
    else:
        (made,) = loaded
    chosen = None if mask is None else made.top(budget, per_layer=per_layer, parts=parts)
    made.save(out)
    if chosen is not None and mask is not None:
        chosen.save(mask)
    said = f"{out}: {how} of {len(loaded)} scores"
    n_weights = None if chosen is None else chosen.n_weights
    talking.finish(
        {"scores": str(out), "mask": None if mask is None else str(mask), "weights": n_weights},
        said if chosen is None else f"{said}; {mask}: {chosen.n_weights:,} weights",
    )
