"""Selections and masks against the slow, obvious way: boolean arrays of the tensor's own shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from locus.errors import InputError
from locus.files.artefact import load_tensors, save_tensors
from locus.mask import WeightMask, shapes_of
from locus.selection import Selection

SHAPES = [(7,), (1, 5), (5, 1), (4, 6), (3, 4, 5), (40, 50)]


@st.composite
def selections(draw: st.DrawFn, shape: tuple[int, ...]) -> Selection:
    kind = draw(st.sampled_from(["all", "rows", "columns", "elements", "dense"]))
    numel = int(torch.Size(shape).numel())
    if kind == "all":
        return Selection("all", None, shape)
    if kind == "dense":
        seed = draw(st.integers(0, 9))
        density = draw(st.sampled_from([0.02, 0.5, 0.98]))
        return Selection.of(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density)
    limit = {"rows": shape[0], "columns": shape[1] if len(shape) > 1 else 0, "elements": numel}[kind]
    if not limit:
        kind, limit = "rows", shape[0]
    index = draw(st.lists(st.integers(0, limit - 1), max_size=12))
    return Selection(kind, torch.tensor(index, dtype=torch.int64), shape)  # type: ignore[arg-type]


pairs = st.sampled_from(SHAPES).flatmap(lambda shape: st.tuples(selections(shape), selections(shape)))


@settings(max_examples=400, deadline=None)
@given(pairs)
def test_set_algebra_equals_boolean_arrays(pair: tuple[Selection, Selection]) -> None:
    a, b = pair
    for got, want in (
        (a | b, a.dense() | b.dense()),
        (a & b, a.dense() & b.dense()),
        (a - b, a.dense() & ~b.dense()),
        (~a, ~a.dense()),
    ):
        assert torch.equal(got.dense(), want)
        assert got.n == int(want.sum())
        assert got == Selection.of(want), "the form is canonical: equal sets are equal objects"
    assert (a == b) == torch.equal(a.dense(), b.dense())


@settings(max_examples=300, deadline=None)
@given(pairs)
def test_form_take_put_contains_touched_and_storage(pair: tuple[Selection, Selection]) -> None:
    a, _ = pair
    where = a.dense()
    rebuilt = Selection(a.kind, a.index, a.shape)
    assert rebuilt == a
    form, data = a.stored()
    assert Selection.restored(form, data, a.shape) == a
    flat = torch.arange(where.numel())
    assert torch.equal(a.contains(flat), where.flatten())
    for axis in range(where.ndim):
        assert torch.equal(
            a.touched(axis), where.movedim(axis, 0).flatten(1).any(1) if where.ndim > 1 else where
        )
    tensor = torch.randn(a.shape)
    values = a.take(tensor)
    assert values.numel() == a.n
    assert torch.equal(values.flatten().sort().values, tensor[where].sort().values)
    for target in (torch.zeros(a.shape), torch.zeros(a.shape[::-1]).permute(*range(len(a.shape))[::-1])):
        a.put_(target, values)
        assert torch.equal(target, torch.where(where, tensor, torch.zeros(())))


@settings(max_examples=300, deadline=None)
@given(pairs, st.integers(1, 9))
def test_windows_of_rows_tile_a_selection_and_its_values(pair: tuple[Selection, Selection], n: int) -> None:
    a, _ = pair
    tensor, out, taken = torch.randn(a.shape), torch.zeros(a.shape), 0
    values = a.take(tensor).flatten()
    for start in range(0, a.shape[0], n):
        stop = min(start + n, a.shape[0])
        window = a.window(start, stop)
        assert window == Selection.of(a.dense()[start:stop])
        window.put_(out[start:stop], values[taken : taken + window.n].view(window.compact_shape))
        taken += window.n
    assert torch.equal(out, torch.where(a.dense(), tensor, 0.0))


def test_take_and_put_keep_every_bit_pattern() -> None:
    """All 65536 bfloat16 patterns, signalling NaNs and -0.0 among them, survive every kind of selection."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256)
    tensor = patterns.view(torch.bfloat16)
    index = torch.arange(0, 256, 3)
    for selection in (
        Selection("all", None, (256, 256)),
        Selection("rows", index, (256, 256)),
        Selection("columns", index, (256, 256)),
        Selection("elements", index * 256, (256, 256)),
        Selection.of(torch.rand(256, 256) < 0.5),
    ):
        out = torch.zeros_like(tensor)
        selection.put_(out, selection.take(tensor))
        assert torch.equal(out.view(torch.int16), torch.where(selection.dense(), patterns, 0))


def test_compact_forms() -> None:
    shape = (4, 6)
    rows = Selection("rows", torch.tensor([1, 2]), shape)
    columns = Selection("columns", torch.tensor([0, 5]), shape)
    assert (rows | Selection("rows", torch.tensor([3]), shape)).kind == "rows"
    assert (~rows).kind == "rows"
    assert (~columns).kind == "columns"
    assert (rows | columns).kind == "elements"
    assert (rows | columns).n == 2 * 6 + 2 * 4 - 2 * 2
    assert ((rows | columns) - columns | (rows & columns)).kind == "rows"
    assert (rows | ~rows).kind == "all"
    assert Selection("elements", torch.arange(6, 12), shape) == Selection("rows", torch.tensor([1]), shape)
    assert Selection("columns", torch.tensor([3]), shape).index.tolist() == [3]  # type: ignore[union-attr]


def test_large_element_sets_cost_a_bit_an_entry_and_small_ones_four_bytes_an_element() -> None:
    shape = (1000, 1000)
    half = Selection.of(torch.rand(shape) < 0.5)
    few = Selection.of(torch.rand(shape) < 0.01)
    assert half.stored()[0] == "bits"
    assert half.stored()[1].nbytes == 125_000  # type: ignore[union-attr]
    assert few.stored()[0] == "elements"
    assert few.stored()[1].nbytes == 4 * few.n  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "index", "shape"),
    [("rows", [4], (4, 2)), ("columns", [2], (4, 2)), ("elements", [-1], (4,)), ("columns", [0], (4,))],
)
def test_an_index_outside_the_tensor_is_refused(kind: str, index: list[int], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        Selection(kind, torch.tensor(index), shape)  # type: ignore[arg-type]


def _model(arch: str) -> object:
    from tests.tiny import tiny_model

    return tiny_model(arch)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "neox", "opt"])
def test_neurons_become_exactly_their_parts(arch: str) -> None:
    """Each neuron's weights, written out with NeuronPart's definition `param.select(axis, offset + i)`."""
    model = _model(arch)
    atlas, shapes = model.atlas, shapes_of(model.module)  # type: ignore[attr-defined]
    chosen = torch.zeros(atlas.n_layers, atlas.d_mlp, dtype=torch.bool)
    chosen[0, [0, 3]] = chosen[-1, [atlas.d_mlp - 1]] = True
    for parts in (("gate", "up", "down"), ("down",), ("up",)):
        mask = WeightMask.of_neurons(atlas, chosen, parts)
        want = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
        for layer, neuron in chosen.nonzero().tolist():
            for part in atlas.neurons[layer]:
                if part.role.split("_")[0] in parts:
                    want[part.param].select(part.axis, part.offset + neuron)[...] = True
        assert {name: s.shape for name, s in mask.entries.items()} == {n: shapes[n] for n in mask.entries}
        assert set(mask.entries) == {name for name, where in want.items() if where.any()}
        for name, selection in mask.entries.items():
            assert torch.equal(selection.dense(), want[name])
        assert mask.neurons_per_layer(atlas).tolist() == chosen.sum(1).tolist()
        assert mask.n_weights == sum(int(w.sum()) for w in want.values())


def _masks() -> tuple[WeightMask, WeightMask, dict[str, tuple[int, ...]]]:
    shapes = {"a": (4, 6), "b": (5,), "c": (3, 3)}
    one = WeightMask(
        {"a": Selection("rows", torch.tensor([0]), (4, 6)), "b": Selection("all", None, (5,))}, "f"
    )
    two = WeightMask({"a": Selection("columns", torch.tensor([1]), (4, 6))}, "f")
    return one, two, shapes


def test_algebra_over_parameters() -> None:
    one, two, shapes = _masks()
    assert (one | two).n_weights == 6 + 5 + 4 - 1
    assert (one & two).n_weights == 1
    assert (one - two).n_weights == 5 + 5
    assert one.complement(shapes).n_weights == 24 + 5 + 9 - 11
    assert (one.complement(shapes) & one).entries == {}
    assert one.complement(shapes).complement(shapes) == one
    assert one.fraction(shapes) == 11 / 38


def test_masks_of_two_models_do_not_combine() -> None:
    one, two, _ = _masks()
    with pytest.raises(InputError, match="two models"):
        one | WeightMask(two.entries, "g")
    with pytest.raises(InputError, match=r"a is \[4, 6\] in one"):
        one | WeightMask({"a": Selection("all", None, (2, 2))}, "f")


def test_parameters_by_name_and_pattern() -> None:
    shapes = {"h.0.mlp.w": (2, 2), "h.1.mlp.w": (2, 2), "h.0.attn.w": (3,)}
    assert set(WeightMask.of_parameters(["*.mlp.*"], shapes).entries) == {"h.0.mlp.w", "h.1.mlp.w"}
    assert WeightMask.of_parameters(["h.0.attn.w"], shapes).n_weights == 3
    with pytest.raises(InputError, match=r"did you mean h\.1\.mlp\.w"):
        WeightMask.of_parameters(["h.1.mpl.w"], shapes)


def test_check_says_what_differs() -> None:
    model = _model("llama")
    module = model.module  # type: ignore[attr-defined]
    name, shape = next(iter(shapes_of(module).items()))
    everything = Selection("all", None, shape)
    WeightMask({name: everything}, model.fingerprint).check(model)  # type: ignore[attr-defined, arg-type]
    other = WeightMask({name: everything}, "0" * 64)
    other.check(model, strict=False)  # type: ignore[arg-type]
    for mask, says in (
        (other, "fingerprint 000000000000"),
        (WeightMask({"nobody.weight": everything}), "no parameter nobody.weight"),
        (WeightMask({name: Selection("all", None, (1, 2))}), "is \\[1, 2\\] in the mask"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            mask.check(model)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_save_and_load_give_the_same_mask_and_the_same_bytes(tmp_path: Path) -> None:
    sparse = Selection.of(torch.rand(300, 200, generator=torch.Generator().manual_seed(1)) < 0.01)
    dense = Selection.of(torch.rand(300, 201, generator=torch.Generator().manual_seed(1)) < 0.5)
    one, _, _ = _masks()
    mask = WeightMask({**one.entries, "s": sparse, "d": dense}, "f", {"method": "x", "of": [1, None, 0.5]})
    mask.save(tmp_path / "mask.safetensors")
    back = WeightMask.load(tmp_path / "mask.safetensors")
    assert back == mask
    assert dict(back.provenance) == dict(mask.provenance)
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "mask.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert (tmp_path / "mask.safetensors").stat().st_size < 4 * sparse.n + 300 * 201 / 8 + 2000


@pytest.mark.parametrize(
    "entry",
    [
        {"form": "rows", "shape": [4, 2]},
        {"form": "nonsense", "shape": [4, 2]},
        {"form": "bits", "shape": [4, 2000]},
        {"form": "elements", "shape": "4"},
        {"shape": [4]},
        7,
    ],
)
def test_a_mask_with_nonsense_inside_is_one_clear_line(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "mask.safetensors"
    tensors: dict[str, Tensor] = {"w": torch.tensor([9], dtype=torch.int32)}
    save_tensors(path, "mask", tensors, {"entries": {"w": entry}, "fingerprint": "", "provenance": {}})
    with pytest.raises(InputError, match="not a mask that locus wrote") as caught:
        WeightMask.load(path)
    assert "\n" not in str(caught.value)
    json.dumps(load_tensors(path, "mask")[1])


def test_one_percent_of_a_seven_billion_model_fits(tmp_path: Path) -> None:
    """One 4096 x 14336 tensor of such a model at 1 %: 2.3 MB, less than a bit a weight."""
    shape = (4096, 14336)
    index = torch.randint(0, shape[0] * shape[1], (shape[0] * shape[1] // 100,))
    mask = WeightMask({"w": Selection("elements", index, shape)})
    mask.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < shape[0] * shape[1] / 8
    assert WeightMask.load(tmp_path / "m") == mask


def test_shapes_of_counts_tied_parameters_once() -> None:
    module = nn.Module()
    module.a = nn.Embedding(3, 2)
    module.b = nn.Linear(2, 3, bias=False)
    module.b.weight = module.a.weight
    assert shapes_of(module) == {"a.weight": (3, 2)}
