"""Deltas: exact to the bit in every dtype, refused on the wrong base, stacked and taken apart in order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from locus.checkpoint_export import Checkpoint
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.files.artefact import save_tensors
from locus.mask import WeightMask
from locus.selection import Selection, same_bits
from tests.tiny import save_tiny, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits at all: NaNs with payloads, infinities, -0.0 and denormals among them."""
    kind = INTS[dtype]
    info = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, dtype=kind, generator=generator).view(dtype)


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(INTS[tensor.dtype]).flatten().tolist()


def _edit(before: dict[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    after = {}
    for i, (name, tensor) in enumerate(before.items()):
        where = torch.rand(tensor.shape, generator=generator) < share
        after[name] = torch.where(where, _noise(tuple(tensor.shape), tensor.dtype, seed + i), tensor)
    return after


class Holder(torch.nn.Module):
    """Bare parameters under the given names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))

    def bits(self) -> dict[str, list[int]]:
        return {name: _bits(parameter) for name, parameter in self.named_parameters()}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([0.0, 0.03, 0.5, 1.0]), st.integers(0, 50))
def test_apply_and_revert_are_exact_to_the_bit(dtype: torch.dtype, share: float, seed: int) -> None:
    before = {"a": _noise((9, 7), dtype, seed), "b": _noise((5,), dtype, seed + 1)}
    after = _edit(before, share, seed)
    delta = WeightDelta.between(before, after)
    model = Holder(before)
    with delta.applied(model):
        assert model.bits() == {name: _bits(tensor) for name, tensor in after.items()}
    assert model.bits() == {name: _bits(tensor) for name, tensor in before.items()}
    delta.apply_(model)
    assert model.bits() == {name: _bits(tensor) for name, tensor in after.items()}
    delta.revert_(model)
    assert model.bits() == {name: _bits(tensor) for name, tensor in before.items()}
    want = sum(int((~same_bits(before[n], after[n])).sum()) for n in before)
    assert delta.n_changed == want


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 50), st.integers(1, 4))
def test_stacks_apply_at_once_and_come_apart_in_order(dtype: torch.dtype, seed: int, n: int) -> None:
    states = [{"a": _noise((6, 8), dtype, seed), "b": _noise((4,), dtype, seed + 1)}]
    for i in range(n):
        states.append(_edit(states[-1], (0.05, 0.4, 1.0)[(seed + i) % 3], seed + 10 * i))
    deltas = [WeightDelta.between(a, b) for a, b in pairwise(states)]
    stack = WeightDelta.stack(deltas)
    direct = WeightDelta.between(states[0], states[-1])
    assert stack.id == direct.id
    assert stack.n_changed == direct.n_changed
    model = Holder(states[0])
    stack.apply_(model)
    assert model.bits() == {name: _bits(tensor) for name, tensor in states[-1].items()}
    for delta in reversed(deltas[1:]):
        stack = stack.unstack(delta)
    assert stack.id == deltas[0].id
    stack.revert_(Holder(states[1]))
    assert not stack.unstack(deltas[0]).changes


def test_a_stack_in_the_wrong_order_is_refused() -> None:
    zero = {"a": torch.zeros(3)}
    one, two = {"a": torch.tensor([1.0, 0, 0])}, {"a": torch.tensor([1.0, 2, 0])}
    first, second = WeightDelta.between(zero, one), WeightDelta.between(one, two)
    with pytest.raises(InputError, match="a: delta 2 was not made on the result"):
        WeightDelta.stack([second, first])
    with pytest.raises(InputError, match="to take off was not made"):
        WeightDelta.stack([first, second]).unstack(first)
    with pytest.raises(InputError, match="no deltas"):
        WeightDelta.stack([])


def test_deltas_of_different_tensors_stack_in_any_order() -> None:
    base = {"a": torch.zeros(3), "b": torch.zeros(2)}
    first = WeightDelta.between(base, {"a": torch.ones(3)})
    second = WeightDelta.between(base, {"b": torch.ones(2)})
    assert WeightDelta.stack([first, second]).id == WeightDelta.stack([second, first]).id


def test_the_wrong_base_is_refused_and_nothing_is_written() -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(3)}
    delta = WeightDelta.between(base, {"a": torch.ones(4), "b": torch.ones(3)})
    model = Holder({"a": torch.zeros(4), "b": torch.tensor([0.0, 0.0, 0.5])})
    bits = model.bits()
    with pytest.raises(
        InputError, match=r"^b: the model does not hold the values this delta was made from; take"
    ):
        delta.apply_(model)
    assert model.bits() == bits
    with pytest.raises(InputError, match=r"^a: the model already holds"):
        delta.apply_(Holder({"a": torch.ones(4), "b": torch.ones(3)}))
    with pytest.raises(InputError, match="holds no tensor a"):
        delta.apply_(Holder({"c": torch.zeros(4)}))
    with pytest.raises(InputError, match=r"is \[2\] in the model and \[4\] in the delta"):
        delta.apply_(Holder({"a": torch.zeros(2), "b": torch.zeros(3)}))


def test_an_entry_that_the_delta_does_not_touch_counts_as_base_too() -> None:
    """Where dtypes agree the whole tensor is compared, not the changed entries alone."""
    delta = WeightDelta.between({"a": torch.zeros(100, 4)}, {"a": torch.eye(100, 4)})
    other = torch.zeros(100, 4)
    other[99, 3] = 1.0
    with pytest.raises(InputError, match="does not hold the values"):
        delta.apply_(Holder({"a": other}))


def test_applied_undoes_itself_on_errors_and_in_other_dtypes() -> None:
    before = {"a": torch.randn(8, 8).bfloat16()}
    after = {"a": before["a"].clone()}
    after["a"][2] += 1
    delta = WeightDelta.between(before, after)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = Holder({"a": before["a"].to(dtype)})
        bits = model.bits()
        with pytest.raises(KeyError), delta.applied(model):
            assert torch.equal(model.a, after["a"].to(dtype))
            raise KeyError
        assert model.bits() == bits
    with pytest.raises(InputError, match="does not hold"), delta.applied(Holder({"a": torch.zeros(8, 8)})):
        pass


def test_an_edit_in_float32_of_a_bfloat16_checkpoint() -> None:
    """1.0 in bfloat16 has neighbours 2^-7 above: +2^-10 vanishes, +2^-7 survives, +3*2^-8 rounds to 2^-6.

    So of three changed entries one vanishes; lost are 2^-10 and 2^-8 of a norm of
    sqrt(2^-20 + 2^-14 + 9*2^-16).
    """
    before = {"a": torch.ones(2, 2).bfloat16()}
    after = {"a": torch.tensor([[1 + 2**-10, 1 + 2**-7], [1 + 3 * 2**-8, 1.0]])}
    delta = WeightDelta.between(before, after)
    assert delta.changes["a"].new.dtype == torch.bfloat16
    assert (delta.rounding.n_wanted, delta.rounding.n_vanished, delta.n_changed) == (3, 1, 2)
    assert delta.rounding.fraction_vanished == pytest.approx(1 / 3)
    wanted = (2**-20 + 2**-14 + 9 * 2**-16) ** 0.5
    lost = (2**-20 + 2**-16) ** 0.5
    assert delta.rounding.relative_norm_lost == pytest.approx(lost / wanted)
    assert delta.norm == pytest.approx((2**-14 + 2**-12) ** 0.5)
    assert delta.to_json()["rounding"]["n_vanished"] == 1


def test_an_edit_in_bfloat16_of_a_float32_checkpoint_keeps_the_bits_it_did_not_change() -> None:
    before = {"a": torch.full((3, 3), 1 / 3)}
    after = {"a": before["a"].bfloat16()}
    after["a"][1, 1] = 2.0
    delta = WeightDelta.between(before, after)
    assert delta.n_changed == 1
    model = Holder(before)
    delta.apply_(model)
    want = before["a"].clone()
    want[1, 1] = 2.0
    assert torch.equal(model.a, want)


def test_nan_payloads_survive_an_edit_in_another_dtype() -> None:
    odd = (
        torch.tensor([0x7FC1, 0x7F81, -0x8000, 0x3F80], dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
    )
    after = odd.float()
    after[3] = 2.0
    delta = WeightDelta.between({"a": odd}, {"a": after})
    assert delta.n_changed == 1
    model = Holder({"a": odd})
    delta.apply_(model)
    assert _bits(model.a)[:3] == _bits(odd)[:3]


def test_overflow_of_the_checkpoint_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="a: edited values overflow the checkpoint's float16"):
        WeightDelta.between({"a": torch.ones(2).half()}, {"a": torch.tensor([1.0, 1e6])})


def test_changes_off_the_mask_are_refused_and_counted() -> None:
    before = {"a": torch.zeros(4, 4), "b": torch.zeros(2)}
    after = {"a": before["a"].clone(), "b": before["b"]}
    after["a"][1, :] = after["a"][2, 3] = 1.0
    mask = WeightMask({"a": Selection("rows", torch.tensor([1]), (4, 4))}, "f")
    with pytest.raises(RuntimeError, match="a: 1 weights outside the mask"):
        WeightDelta.between(before, after, mask)
    free = WeightDelta.between(before, after)
    assert free.outside(mask) == 1
    assert free.outside(WeightMask({})) == 5
    after["a"][2, 3] = 0.0
    delta = WeightDelta.between(before, after, mask)
    assert delta.outside(mask) == 0
    assert delta.base_fingerprint == "f"
    with pytest.raises(RuntimeError, match="b: 2 weights outside"):
        WeightDelta.between(before, after | {"b": torch.ones(2)}, mask)


def test_entries_give_the_same_delta_as_an_edited_copy() -> None:
    before = {"a": torch.randn(6, 6).bfloat16()}
    for dtype in (torch.float32, torch.bfloat16):
        edited = before["a"].to(dtype)
        selection = Selection("columns", torch.tensor([1, 4]), (6, 6))
        values = torch.randn(6, 2).to(dtype)
        selection.put_(edited, values)
        whole = WeightDelta.between(before, {"a": edited})
        entries = WeightDelta.of_entries(before, {"a": (selection, values)})
        assert entries.id == whole.id
        assert entries.rounding == whole.rounding


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_save_and_load(tmp_path: Path, share: float) -> None:
    before = {"a.b": _noise((40, 30), torch.bfloat16, 1), "c": _noise((9,), torch.float16, 2)}
    delta = WeightDelta.between(before, _edit(before, share, 3), provenance={"editor": "none", "lr": 0.1})
    delta.save(tmp_path / "d.safetensors")
    back = WeightDelta.load(tmp_path / "d.safetensors")
    assert (back.id, back.rounding, back.provenance) == (delta.id, delta.rounding, delta.provenance)
    for name, change in delta.changes.items():
        assert back.changes[name].selection == change.selection
        assert bool(same_bits(back.changes[name].new, change.new).all())
        assert bool(same_bits(back.changes[name].old, change.old).all())
    back.save(tmp_path / "e.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()
    back.save(tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()


def test_a_delta_with_nonsense_inside_is_one_clear_line(tmp_path: Path) -> None:
    good = {"w:old": torch.zeros(1, 2), "w:new": torch.ones(1, 2), "w:index": torch.tensor([0])}
    entry = {"form": "rows", "shape": [4, 2], "before": "x", "after": "y"}
    meta = {"base_fingerprint": "", "provenance": {}, "rounding": {}}
    path = tmp_path / "d.safetensors"
    save_tensors(path, "delta", good, {**meta, "entries": {"w": entry}})
    assert WeightDelta.load(path).n_changed == 2
    for tensors, bad in (
        (good, {"w": {**entry, "shape": [4, 3]}}),
        (good, {"w": {**entry, "form": "all"}}),
        (good, {"w": {"form": "rows"}}),
        (good, {"v": entry}),
        (good, [1]),
        ({**good, "w:index": torch.tensor([9])}, {"w": entry}),
        ({**good, "w:new": torch.ones(1, 2).half()}, {"w": entry}),
    ):
        save_tensors(path, "delta", tensors, {**meta, "entries": bad})
        with pytest.raises(InputError, match="not a delta that locus wrote") as caught:
            WeightDelta.load(path)
        assert "\n" not in str(caught.value)


def test_the_smallest_covering_form_is_kept() -> None:
    base = torch.zeros(100, 100)
    for where, kind in (((3,), "rows"), ((slice(None), 5), "columns"), ((3, 4), "elements"), ((...,), "all")):
        edited = base.clone()
        edited[where] = 1.0
        change = WeightDelta.between({"a": base}, {"a": edited}).changes["a"]
        assert change.selection.kind == kind
    edited = base.clone()
    edited[3, :95] = 1.0
    change = WeightDelta.between({"a": base}, {"a": edited}).changes["a"]
    assert (change.selection.kind, change.n_changed) == ("rows", 95)


@pytest.mark.parametrize("arch", ["gpt2", "smollm", "neox"])
def test_tied_embeddings_change_once(arch: str) -> None:
    model = tiny_model(arch)
    module = model.module
    name = next(n for n, p in module.named_parameters() if p is module.get_input_embeddings().weight)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    after = dict(before)
    after[name] = before[name].clone()
    after[name][7] += 1
    delta = WeightDelta.between(module, after)
    assert list(delta.changes) == [name]
    assert delta.changes[name].selection.kind == "rows"
    logits = module(torch.tensor([[1, 2, 7]])).logits
    with delta.applied(model):
        assert torch.equal(module.get_input_embeddings().weight, after[name])
        assert not torch.equal(module(torch.tensor([[1, 2, 7]])).logits, logits)
    assert torch.equal(module(torch.tensor([[1, 2, 7]])).logits, logits)
    assert delta.base_fingerprint == model.fingerprint


def test_a_model_from_a_folder_stands_for_its_checkpoint(tmp_path: Path) -> None:
    """The model runs in float32, the checkpoint is bfloat16: the delta is in bfloat16 and fits the folder."""
    from locus.model import Model

    tiny = tiny_model("llama")
    tiny.module.bfloat16()
    save_tiny(tiny, tmp_path / "base")
    tiny.module.float()
    model = Model(tiny.module, tiny.tokenizer, tiny.atlas, "tiny", tmp_path / "base", tiny.bos)
    name = tiny.atlas.neurons[1][0].param
    with torch.no_grad():
        model.module.get_parameter(name)[3] += 0.7
    delta = WeightDelta.between(model, model, WeightMask.of_parameters([name], {name: (48, 32)}))
    change = delta.changes[name]
    assert (change.selection.kind, change.old.dtype) == ("rows", torch.bfloat16)
    assert torch.equal(change.old[0], Checkpoint(tmp_path / "base").tensor(name)[3])
    assert delta.base_fingerprint == Checkpoint(tmp_path / "base").fingerprint()
    assert 0 < delta.rounding.relative_norm_lost < 0.01
