"""An edit as peft's sparse adapter: what peft makes of it is the edited model to the bit, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from locus.checkpoint_export import Checkpoint
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.selection import Selection
from locus.sparse_adapter import export_adapter
from tests.tiny import save_tiny, tiny_model

IDS = torch.tensor([[1, 5, 9, 30, 2]])
DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


def _base(folder: Path, dtype: torch.dtype = torch.float32, arch: str = "llama") -> Checkpoint:
    model = tiny_model(arch)
    torch.nn.Module.to(model.module, dtype)
    return Checkpoint(save_tiny(model, folder))


def _delta(base: Checkpoint, chosen: dict[str, Selection], step: float = 1e-2) -> WeightDelta:
    """Random new values there."""
    generator = torch.Generator().manual_seed(1)
    entries: dict[str, tuple[Selection, Tensor]] = {}
    for name, selection in chosen.items():
        old = selection.take(base.tensor(name)).float()
        entries[name] = (selection, old + step * torch.randn(old.shape, generator=generator))
    return WeightDelta.of_entries(base, entries)


def _loaded(base: Checkpoint, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_makes_the_edited_model_of_it_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    from peft import PeftModel

    base = _base(tmp_path / "base", dtype)
    shapes = base.shapes
    chosen = {
        DOWN: Selection("columns", torch.tensor([2, 5]), shapes[DOWN]),
        UP: Selection("rows", torch.tensor([0, 7]), shapes[UP]),
    }
    delta = _delta(base, chosen)
    r = export_adapter(base, delta, tmp_path / "adapter")
    assert r * sum(shapes[DOWN]) >= 2 * shapes[DOWN][0] > (r - 1) * sum(shapes[DOWN])
    edited = _loaded(base, dtype)
    delta.apply_(edited)
    adapted = PeftModel.from_pretrained(_loaded(base, dtype), tmp_path / "adapter")
    assert torch.equal(adapted(IDS).logits, edited(IDS).logits)
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, parameter in edited.named_parameters():
        # Bits, not values: minus zero is a number of its own.
        assert torch.equal(merged[name].view(torch.uint8), parameter.view(torch.uint8)), name


def test_what_is_filled_in_leaves_minus_zero_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.get_parameter(DOWN).zero_().neg_()
    base = Checkpoint(save_tiny(model, tmp_path / "base"))
    one = Selection("elements", torch.tensor([3]), base.shapes[DOWN])
    export_adapter(base, _delta(base, {DOWN: one}), tmp_path / "adapter")


def test_what_cannot_be_added_exactly_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    one = Selection("elements", torch.tensor([3]), base.shapes[DOWN])
    old = float(base.tensor(DOWN).flatten()[3])
    tiny = WeightDelta.of_entries(base, {DOWN: (one, torch.tensor([old * 1e-30]))})
    with pytest.raises(InputError, match=r"no float32 number added to the base gives .* exactly"):
        export_adapter(base, tiny, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    gpt2 = _base(tmp_path / "gpt2", arch="gpt2")
    norm, words = "model.norm.weight", "model.embed_tokens.weight"
    conv = next(name for name in gpt2.shapes if name.endswith("h.0.mlp.c_fc.weight"))
    for there, name, why in (
        (base, norm, "Linear modules only"),
        (base, words, "Linear modules only"),
        (gpt2, conv, "Conv1D"),
        (base, DOWN, "too dense"),
    ):
        with pytest.raises(InputError, match=why):
            delta = _delta(there, {name: Selection("all", None, there.shapes[name])})
            export_adapter(there, delta, tmp_path / "adapter")
    with pytest.raises(InputError, match="changes nothing"):
        export_adapter(base, WeightDelta({}, {}, {}), tmp_path / "adapter")
    other = tiny_model("llama", seed=3)
    delta = _delta(base, {DOWN: Selection("rows", torch.tensor([0]), base.shapes[DOWN])})
    with pytest.raises(InputError, match="does not hold the values"):
        export_adapter(Checkpoint(save_tiny(other, tmp_path / "other")), delta, tmp_path / "adapter")
