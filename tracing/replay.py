"""The replay engine: patched forwards computed only where a patch can change them.

Of one prompt, one run is recorded whole and the other from where it diverges: every block's input, keys and
values, and the arguments of every block's call. A patch at (layer l, position t) can change only positions
>= t in layers >= l. Those rows, of all draws and of all patches of lower layers, travel together through block
l+1, l+2, …, attending to the recorded keys and values of everything before them; of the last block only
the positions that are read are computed; final norm, unembedding and metric see those alone. Rows before the first
corrupted token have an effect of exactly zero and are never run. The first corrupted token, restored, stays
clean in all later layers, so that its rows are the recorded ones too.

Everything runs through the model's own blocks (`tracing.blocks`), so that what is right for a whole forward is
right here, and the same code serves every decoder whose blocks exchange information by attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from locus.model import Model
from locus.progress import task
from tracing.blocks import CannotReplay, Tail
from tracing.packing import Track, track_of
from tracing.question import Answers, Question
from tracing.readout import Readout
from tracing.runs import record_runs
from tracing.sites import Cell, sources_needed
from tracing.wave import Wave, Work

__all__ = ["CannotReplay", "answer_by_replay"]

_CPU_ROWS = 400
"""Rows that keep a core's caches warm while its matrix products stay large."""
_LOGIT_ROWS = 256


@torch.no_grad()
def answer_by_replay(
    model: Model,
    question: Question,
    cells: Sequence[Cell],
    readout: Readout,
    *,
    batch_tokens: int | None = None,
) -> Answers:
    """Answer every cell, exactly as whole forwards would.

    Args:
        model: Left as it is.
        question: The two runs, and where to read.
        cells: The patched forwards.
        readout: What to read off the logits.
        batch_tokens: Rows that go through a block at once, at least one track's; None for a size that suits
            the device and its free memory. Halved and tried again when memory runs out.

    Raises:
        CannotReplay: why the model or the question needs whole forwards.
    """
    budget = batch_tokens or default_budget(model, question)
    while True:
        try:
            return _answer(model, question, cells, readout, budget)
        except RuntimeError as error:
            if not _out_of_memory(error) or budget <= question.n_pos:
                raise
            budget //= 2


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the processor's own memory, had no room (for which torch has no error of its own)."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def default_budget(model: Model, question: Question) -> int:
    """Rows that go through a block at once: what a core's caches hold, or a share of a device's free memory."""
    if model.device.type != "cuda":
        return _CPU_ROWS * max(1, torch.get_num_threads())
    free, _ = torch.cuda.mem_get_info(model.device)
    width = 6 * model.atlas.d_model + 3 * model.atlas.d_mlp
    scores = 2 * model.atlas.n_heads * (question.n_pos + 256)
    return max(1024, min(16384, int(0.2 * free / (model.dtype.itemsize * (width + scores)))))


def _answer(
    model: Model, question: Question, cells: Sequence[Cell], readout: Readout, budget: int
) -> Answers:
    runs = record_runs(model, question, *sources_needed(cells), budget)
    tail = Tail.of(runs.recorded, question.reads)
    n_layers = model.atlas.n_layers
    found = [track_of(i, cell, runs.diverges, n_layers, question.reads) for i, cell in enumerate(cells)]
    tracks = [track for track in found if track is not None]
    base, other = (
        tail.scores(run.hidden(n_layers, torch.tensor(question.reads)), readout, _LOGIT_ROWS)
        for run in (runs.base, runs.other)
    )
    scores = base.expand(question.samples, -1).repeat(len(cells), 1, 1)
    work = Work(question, runs, budget)
    with task("patched forwards, replayed", len(tracks)) as line:
        for tracks_at_once in _waves(tracks, work):
            final = _through_all_blocks(Wave(work, tracks_at_once), tracks_at_once[0].entry, n_layers)
            got = tail.scores(final.flatten(0, 1), readout, _LOGIT_ROWS)
            scores[[t.cell for t in tracks_at_once]] = got.unflatten(0, (-1, question.samples))
            line.advance(len(tracks_at_once))
    return Answers(base, other, scores, (work.rows_run + runs.rows_run) / n_layers)


def _waves(tracks: Sequence[Track], work: Work) -> list[list[Track]]:
    """Tracks whose states are held at the same time, those of like length together."""
    limit = work.runs.model.atlas.n_layers * work.budget // work.question.samples
    waves: list[list[Track]] = []
    held = 0
    for track in sorted(tracks, key=lambda t: (-t.start, t.entry, t.cell)):
        rows = len(work.positions(track))
        if not waves or held + rows > limit:
            waves.append([])
            held = 0
        waves[-1].append(track)
        held += rows
    return [sorted(wave, key=lambda t: (t.entry, -t.start, t.cell)) for wave in waves]


def _through_all_blocks(wave: Wave, first: int, n_layers: int) -> Float[Tensor, "track sample read d_model"]:
    """What the last block gives where it is read."""
    for layer in range(first, n_layers):
        wave.admit(layer)
        if layer < n_layers - 1:
            wave.through(layer)
        else:
            wave.through_last(layer)
    wave.admit(n_layers)
    return wave.final()
