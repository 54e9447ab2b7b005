"""The replay engine: patched forwards computed only where a patch can change them.

Of one prompt, one run is recorded whole and the other from where it diverges: every block's input, keys and
values, and the arguments of every block's call. A patch at (layer l, position t) can change only positions
>= t in layers >= l. Those rows, of all draws and of all patches of lower layers, travel together through block
l+1, l+2, …, attending to the recorded keys and values of everything before them; of the last block only
the positions that are read are computed; final norm, unembedding and metric see those alone. Rows before the first
corrupted token have an effect of exactly zero and are never run. The first corrupted token, restored, stays
clean in all later layers, so that its rows are the recorded ones too.

Everything runs through the model's own blocks (`tracing.replay.blocks`), so that what is right for a whole forward is
right here, and the same code serves every decoder whose blocks exchange information by attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from locus.model import Model
from locus.progress import task
from tracing.patching.readout import Readout
from tracing.patching.runs import Asked, PatchingQuestion, RunScores
from tracing.patching.sites import PatchedRun, sources_needed
from tracing.replay.advance import PatchedRows
from tracing.replay.blocks import CannotReplay, Tail, masked_attention, out_of_memory
from tracing.replay.context import ReplayContext, side_by_side
from tracing.replay.packing import Track, track_of
from tracing.replay.recorded_runs import record_runs

__all__ = ["CannotReplay", "answer_by_replay", "answer_together"]

_CPU_ROWS = 400
"""Rows that keep a core's caches warm while its matrix products stay large."""
_GPU_ROWS = 16384
_LOGIT_ROWS = 256


def answer_by_replay(
    model: Model,
    question: PatchingQuestion,
    cells: Sequence[PatchedRun],
    readout: Readout,
    *,
    batch_tokens: int | None = None,
) -> RunScores:
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
    return answer_together(model, [Asked(question, cells, readout)], batch_tokens=batch_tokens)[0]


@torch.no_grad()
def answer_together(
    model: Model, asked: Sequence[Asked], *, batch_tokens: int | None = None
) -> list[RunScores]:
    """Answer several questions, their rows side by side in the same calls where the blocks allow it.

    That pays where one question's rows are too few to keep the device busy. Arguments and errors are those of
    `answer_by_replay`; when memory runs out, half as many questions are tried before smaller calls are.
    """
    budget = batch_tokens or default_budget(model, max(one.question.n_pos for one in asked))
    with masked_attention(model):
        return _retried(model, list(asked), budget)


def _retried(model: Model, asked: list[Asked], budget: int) -> list[RunScores]:
    while True:
        try:
            return _answer(model, asked, budget)
        except RuntimeError as error:
            least = max(one.question.n_pos for one in asked)
            if not out_of_memory(error) or (len(asked) == 1 and budget <= least):
                raise
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(asked) > 1:
            half = len(asked) // 2
            return _retried(model, asked[:half], budget) + _retried(model, asked[half:], budget)
        budget //= 2


def full_budget(model: Model) -> int:
    """Rows that keep a device busy: what the cores' caches hold, or what fills a GPU."""
    return _GPU_ROWS if model.device.type == "cuda" else _CPU_ROWS * max(1, torch.get_num_threads())


def default_budget(model: Model, n_pos: int) -> int:
    """Rows that go through a block at once: as many as keep the device busy, fewer where its free memory is small.

    On a GPU a power of two, so that a little more or less free memory does not change the last bits.
    """
    full = full_budget(model)
    if model.device.type != "cuda":
        return full
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    width = 6 * model.atlas.d_model + 3 * model.atlas.d_mlp
    scores = 2 * model.atlas.n_heads * (n_pos + 256)
    rows = int(0.2 * free / (model.dtype.itemsize * (width + scores)))
    return max(1024, min(full, 1 << max(0, rows.bit_length() - 1)))


def _answer(model: Model, asked: Sequence[Asked], budget: int) -> list[RunScores]:
    runs = [record_runs(model, one.question, *sources_needed(one.cells), budget) for one in asked]
    answers: list[RunScores | None] = [None] * len(asked)
    with task("patched forwards, replayed", sum(len(one.cells) for one in asked)) as line:
        for group in side_by_side(runs):
            context = ReplayContext.of([asked[i].question for i in group], [runs[i] for i in group], budget)
            found = _answer_group(context, [asked[i] for i in group], line.advance)
            for i, answer in zip(group, found, strict=True):
                answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _answer_group(
    context: ReplayContext, asked: Sequence[Asked], advance: Callable[[int], None]
) -> list[RunScores]:
    tails = [
        Tail.of(runs.recorded, one.question.reads) for runs, one in zip(context.runs, asked, strict=True)
    ]
    ends = [
        _unpatched(context, tail, i, one.readout)
        for i, (tail, one) in enumerate(zip(tails, asked, strict=True))
    ]
    scores = [
        base.expand(context.samples, -1).repeat(len(one.cells), 1, 1)
        for (base, _), one in zip(ends, asked, strict=True)
    ]
    for tracks in _batches_of_tracks(_tracks(context, asked), context):
        rows = PatchedRows(context, tracks)
        _through_all_blocks(rows, tracks[0].entry, context.n_layers)
        for i in sorted({track.of for track in tracks}):
            own, final = rows.final(i)
            got = tails[i].scores(final.flatten(0, 1), asked[i].readout, _LOGIT_ROWS)
            scores[i][[tracks[t].cell for t in own]] = got.unflatten(0, (-1, context.samples))
        advance(len(tracks))
    return [
        RunScores(base, other, cells, rows / context.n_layers)
        for (base, other), cells, rows in zip(ends, scores, context.rows_run, strict=True)
    ]


def _unpatched(context: ReplayContext, tail: Tail, of: int, readout: Readout) -> tuple[Tensor, Tensor]:
    """The scores of both runs of one question."""
    reads, runs = torch.tensor(context.questions[of].reads), context.runs[of]
    base, other = (
        tail.scores(run.hidden(context.n_layers, reads), readout, _LOGIT_ROWS)
        for run in (runs.base, runs.other)
    )
    return base, other


def _tracks(context: ReplayContext, asked: Sequence[Asked]) -> list[Track]:
    """What has to be computed for all cells of all questions."""
    found = [
        track_of(i, cell, context.runs[of].diverges, context.n_layers, one.question.reads, of)
        for of, one in enumerate(asked)
        for i, cell in enumerate(one.cells)
    ]
    return [track for track in found if track is not None]


def _batches_of_tracks(tracks: Sequence[Track], context: ReplayContext) -> list[list[Track]]:
    """Tracks whose states are held at the same time, those of one question and of like length together."""
    limit = context.n_layers * context.budget // context.samples
    batches: list[list[Track]] = []
    held = 0
    for track in sorted(tracks, key=lambda t: (t.of, -t.start, t.entry, t.cell)):
        rows = len(context.positions(track))
        if not batches or held + rows > limit:
            batches.append([])
            held = 0
        batches[-1].append(track)
        held += rows
    return [sorted(batch, key=lambda t: (t.entry, t.of, -t.start, t.cell)) for batch in batches]


def _through_all_blocks(rows: PatchedRows, first: int, n_layers: int) -> None:
    """Up to what the last block gives where it is read."""
    for layer in range(first, n_layers):
        rows.admit(layer)
        if layer < n_layers - 1:
            rows.through(layer)
        else:
            rows.through_last(layer)
    rows.admit(n_layers)
