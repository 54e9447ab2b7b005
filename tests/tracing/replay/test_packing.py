"""What a patch can change, row by row: tracks, packed rows, and who sees whom, worked out by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny_model
from tracing.patching.sites import Patch, PatchedRun, cells_of, sources_needed
from tracing.replay.packing import Packed, Track, rows_of, track_of


def track(*patches: Patch, diverges: int = 2, reads: tuple[int, ...] = (5,)) -> Track | None:
    """Of a model of 4 layers."""
    return track_of(0, PatchedRun(patches), diverges, 4, reads)


def test_where_a_patched_run_leaves_the_base_run() -> None:
    restored = track(Patch("resid_post", (1, 2), (3,)))
    assert restored is not None and (restored.entry, restored.start, restored.restored_until) == (2, 3, 0)
    window = track(Patch("mlp_out", (0, 3), (4,)))
    assert window is not None and (window.entry, window.start, window.enters_inside) == (1, 4, True)
    before = track(Patch("resid_pre", (1, 2), (3,)))
    assert before is not None and (before.entry, before.enters_inside) == (1, False)


def test_the_first_corrupted_position_restored_needs_no_row() -> None:
    first = track(Patch("resid_post", (1, 2), (2,)))
    assert first is not None and (first.start, first.restored_until) == (3, 3)
    stretch = track(Patch("resid_post", (1, 2), (0, 1, 2, 3)))
    assert stretch is not None and (stretch.start, stretch.restored_until) == (4, 4)
    gap = track(Patch("resid_post", (1, 2), (2, 4)))
    assert gap is not None and (gap.start, gap.restored_until) == (2, 0)
    severed = track(Patch("resid_post", (1, 2), (2,)), Patch("mlp_out", (2, 4), (2,), "base"))
    assert severed is not None and (severed.start, severed.restored_until) == (2, 0)
    window = track(Patch("mlp_out", (1, 2), (2,)))
    assert window is not None and window.restored_until == 0


def test_what_changes_nothing_is_not_run() -> None:
    assert track(Patch("resid_post", (1, 2), (0, 1))) is None, "before the runs differ"
    assert track(Patch("resid_post", (3, 4), (4,))) is None, "last layer, not read"
    assert track(Patch("resid_post", (3, 4), (5,))) is not None
    assert track(Patch("mlp_out", (2, 2), (4,))) is None, "no layer"
    assert track(Patch("mlp_out", (1, 3), (4,), "base")) is None, "the base run's own values"
    assert track(Patch("mlp_out", (1, 2), (0,), "zero")) is not None, "zero is neither run's value"


def test_rows_see_the_base_run_before_their_track_and_only_their_own_after() -> None:
    """Tracks from positions 3 and 4 of 5, runs differ from 2 on; the second has position 2 restored.

    Keys: base 0 to 3, the other run's 2, then the rows 3, 4 | 4.
    """
    packed = Packed.of_tracks([[3, 4], [4]])
    chunk = packed.chunk([slice(0, 3)])
    rows, n_base, n_other = rows_of(
        chunk, torch.tensor([3, 3]), torch.tensor([0, 3]), torch.tensor([2, 2]), draws=1
    )
    assert (n_base, n_other) == (3, 1)
    assert rows.key_positions.tolist() == [[0, 1, 2, 2, 3, 4, 4]]
    assert rows.visible[0].int().tolist() == [
        [1, 1, 1, 0, 1, 1, 0],
        [1, 1, 1, 0, 1, 1, 0],
        [1, 1, 0, 1, 0, 0, 1],
    ]


def test_rows_inside_a_block_see_the_base_run_alone() -> None:
    packed = Packed.of_tracks([[3], [1, 4]])
    rows, n_base, n_other = rows_of(
        packed.chunk([slice(0, 3)]),
        torch.tensor([3, 1]),
        torch.tensor([0, 0]),
        torch.tensor([2, 2]),
        draws=1,
        inside=True,
    )
    assert (n_base, n_other) == (5, 0)
    assert rows.visible[0, :, :5].all() and not rows.visible[0, :, 5:].any()


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    draws=st.integers(1, 12),
    budget=st.integers(1, 900),
)
def test_every_row_travels_once_and_no_track_is_cut(lengths: list[int], draws: int, budget: int) -> None:
    packed = Packed.of_tracks([list(range(n)) for n in lengths])
    calls = packed.calls(draws, budget)
    assert [r for call in calls for piece in call for r in range(piece.start, piece.stop)] == list(
        range(sum(lengths))
    )
    starts = {sum(lengths[:i]) for i in range(len(lengths) + 1)}
    assert all(piece.start in starts and piece.stop in starts for call in calls for piece in call)
    for call in calls:
        rows = sum(piece.stop - piece.start for piece in call) * draws
        assert rows <= max(budget, draws * max(lengths)), (
            "a call is larger than the budget only for a single track"
        )
        chunk = packed.chunk(call)
        real = chunk.source if chunk.kept is None else chunk.source[chunk.kept]
        assert real.tolist() == [r for piece in call for r in range(piece.start, piece.stop)]


def test_windows_are_clipped_and_severed_paths_start_behind() -> None:
    atlas = tiny_model("llama", num_hidden_layers=12).atlas
    rows = cells_of("mlp", atlas, [3], 10)
    assert [row[0].patches[0].layers for row in rows][:2] == [(0, 5), (0, 6)]
    assert rows[6][0].patches[0].layers == (1, 11) and rows[11][0].patches[0].layers == (6, 12)
    severed = cells_of("block-no-mlp", atlas, [3], 10)[4][0]
    assert [(p.site, p.layers, p.source) for p in severed.patches] == [
        ("resid_post", (4, 5), "other"),
        ("mlp_out", (5, 12), "base"),
    ]
    assert sources_needed([severed]) == ({"resid_post"}, {"mlp_out"})
    head = cells_of("head:1", atlas, [3], 10)[0][0].patches[0]
    assert head.columns == tuple(range(8, 16))
