"""The plain engine: every cell is a whole forward with hooks. Slow and obvious.

It is what the replay engine is tested against, and what answers for the architectures that cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locus.hooks import patched, record
from locus.model import Model
from locus.progress import track
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs, PatchingQuestion, RunScores
from tracing.patching.sites import Patch, PatchedRun, Site, site_module, sources_needed

SiteValues = dict[tuple[Site, int], Float[Tensor, "_ pos _"]]
"""(site, layer) -> its values in one run."""


@torch.no_grad()
def answer_plainly(
    model: Model,
    question: PatchingQuestion,
    cells: Sequence[PatchedRun],
    readout: Readout,
    *,
    batch_tokens: int = 4096,
) -> RunScores:
    """Run every cell as a whole forward of the model, several cells in one batch.

    Args:
        model: Left as it is.
        question: The two runs, and where to read.
        cells: The patched forwards.
        readout: What to read off the logits.
        batch_tokens: Tokens in one forward, at least one cell's.
    """
    from_other, from_base = sources_needed(cells)
    other_scores, other = unpatched_run(model, question.other, question.reads, readout, from_other)
    base_scores, base = unpatched_run(model, question.base, question.reads, readout, from_base)
    samples = question.samples
    per_forward = max(1, batch_tokens // (samples * question.n_pos))
    chunks = [cells[i : i + per_forward] for i in range(0, len(cells), per_forward)]
    scores = []
    for chunk in track(chunks, "patched forwards, plain"):
        got = _patched_run(model, question, chunk, readout, base, other)
        scores.append(got.unflatten(0, (len(chunk), samples)))
    forwards = question.other.samples + question.base.samples + len(cells) * samples
    grid = torch.cat(scores) if scores else base_scores.new_zeros(0, samples, base_scores.shape[-1])
    return RunScores(base_scores, other_scores, grid, tokens=float(forwards * question.n_pos))


def unpatched_run(
    model: Model, inputs: Inputs, reads: Sequence[int], readout: Readout, sites: Iterable[Site] = ()
) -> tuple[Float[Tensor, "sample score"], SiteValues]:
    """One unpatched run: its scores, and the values of some sites in every layer."""
    names = {
        (site, layer): site_module(model.atlas, site, layer)
        for site in sites
        for layer in range(model.atlas.n_layers)
    }
    outputs = {name for name, side in names.values() if side == "output"}
    entries = {name for name, side in names.values() if side == "input"}
    with record(model.module, outputs=outputs, inputs=entries) as seen:
        scores = readout(logits_of(model, inputs, reads, inputs.samples))
    states = {
        key: (seen.outputs if side == "output" else seen.inputs)[name] for key, (name, side) in names.items()
    }
    return scores.cpu(), states


def logits_of(
    model: Model, inputs: Inputs, reads: Sequence[int], batch: int, **arguments: Any
) -> Float[Tensor, "batch read d_vocab"]:
    """Logits at the positions that are read, of `batch` copies of the inputs; draws take turns.

    `arguments` go to the model's forward as they are.
    """
    ids = inputs.ids.to(model.device).expand(batch, -1)
    here = list(reads)
    keep_reads = {model.atlas.unembed: lambda hidden: hidden[:, here]}
    with patched(model.module, {model.atlas.embed: inputs.embedded}, keep_reads):
        logits: Tensor = model.module(input_ids=ids, **{"use_cache": False, **arguments}).logits
    return logits


def _patched_run(
    model: Model,
    question: PatchingQuestion,
    cells: Sequence[PatchedRun],
    readout: Readout,
    base: SiteValues,
    other: SiteValues,
) -> Float[Tensor, "cell_and_sample score"]:
    samples = question.samples
    hooks: dict[tuple[Site, int], list[tuple[int, Patch]]] = {}
    for index, cell in enumerate(cells):
        for patch in cell.patches:
            for layer in range(*patch.layers):
                hooks.setdefault((patch.site, layer), []).append((index, patch))

    outputs: dict[str, Callable[[Tensor], Tensor]] = {}
    inputs: dict[str, Callable[[Tensor], Tensor]] = {}
    for (site, layer), wanted in hooks.items():
        name, side = site_module(model.atlas, site, layer)
        (outputs if side == "output" else inputs)[name] = partial(
            _written, question, site, layer, wanted, base, other
        )
    with patched(model.module, outputs, inputs):
        return readout(logits_of(model, question.base, question.reads, len(cells) * samples)).cpu()


def _written(
    question: PatchingQuestion,
    site: Site,
    layer: int,
    wanted: Sequence[tuple[int, Patch]],
    base: SiteValues,
    other: SiteValues,
    state: Tensor,
) -> Tensor:
    """What flows through one site of all cells' copies, patched where a cell (by its number) wants it."""
    state, width = state.clone(), state.shape[-1]
    for index, patch in wanted:
        rows = state[index * question.samples : (index + 1) * question.samples]
        columns = list(patch.columns) if patch.columns is not None else list(range(width))
        for position in patch.positions:
            new = _value(question, patch, site, layer, position, base, other)
            rows[:, position, columns] = new.to(state)[..., columns] if new.dim() else new.to(state)
    return state


def _value(
    question: PatchingQuestion,
    patch: Patch,
    site: Site,
    layer: int,
    position: int,
    base: SiteValues,
    other: SiteValues,
) -> Tensor:
    """What a patch writes: `sample width`, `width`, or a scalar zero."""
    if patch.source == "zero":
        return torch.zeros(())
    if patch.source == "mean":
        return question.means[site, layer]
    states = other if patch.source == "other" else base
    return states[site, layer][:, position]
