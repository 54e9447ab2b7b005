"""Control masks are of equal size and kind to the weight, and never the mask itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from locus.errors import InputError
from locus.mask import WeightMask, shapes_of
from locus.mask_controls import Profile, control_masks
from locus.model import Model
from locus.selection import Selection
from tests.tiny import tiny_model

PROFILES: tuple[Profile, ...] = ("layers", "uniform")


def per_tensor(mask: WeightMask) -> dict[str, int]:
    return {name: one.n for name, one in mask.entries.items()}


def per_kind(mask: WeightMask) -> dict[str, int]:
    """Weights by the tensor's name without its layer."""
    found: dict[str, int] = {}
    for name, one in mask.entries.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        found[kind] = found.get(kind, 0) + one.n
    return found


def chosen(model: Model, share: float, seed: int = 0) -> Tensor:
    n = model.atlas.n_layers, model.atlas.d_mlp
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share


def checked(model: Model, mask: WeightMask, profile: Profile, n: int = 4) -> list[WeightMask]:
    """Draws, with what holds for all of them: size, kinds, and that no two are equal."""
    drawn = control_masks(model, mask, n, profile)
    for one in drawn:
        assert one.n_weights == mask.n_weights
        assert per_kind(one) == per_kind(mask)
        if profile == "layers":
            assert per_tensor(one) == per_tensor(mask)
        one.check(model)
    assert len({one.digest for one in (mask, *drawn)}) == n + 1
    return drawn


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "neox", "opt"])
@pytest.mark.parametrize("parts", [("gate", "up", "down"), ("down",), ("up",), ("gate", "down")])
def test_neurons_by_neurons_with_the_same_parts(arch: str, parts: tuple[str, ...], profile: Profile) -> None:
    """Conv1D (GPT-2), fused gate and up (Phi-3), biases (GPT-2, NeoX, OPT)."""
    model = tiny_model(arch)
    mask = WeightMask.of_neurons(model.atlas, chosen(model, 0.1), parts, model.fingerprint)
    for one in checked(model, mask, profile):
        counts = one.neurons_per_layer(model.atlas)
        assert counts.sum() == mask.neurons_per_layer(model.atlas).sum()
        if profile == "layers":
            assert torch.equal(counts, mask.neurons_per_layer(model.atlas))
        drawn = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
        for layer, pieces in enumerate(model.atlas.neurons):
            for part in pieces:
                if part.param in one.entries:
                    along = one.entries[part.param].touched(part.axis)
                    drawn[layer] |= along[part.offset : part.offset + model.atlas.d_mlp]
        again = WeightMask.of_neurons(model.atlas, drawn, parts, model.fingerprint)
        assert again == one, "the same parts of every drawn neuron, and nothing else"


@pytest.mark.parametrize("profile", PROFILES)
def test_a_union_without_parts_in_its_provenance(profile: Profile) -> None:
    model = tiny_model("llama")
    a, b = (
        WeightMask.of_neurons(model.atlas, chosen(model, 0.1, seed), ("down",), model.fingerprint)
        for seed in (0, 1)
    )
    assert "parts" not in (a | b).provenance
    checked(model, a | b, profile)
    mixed = a | WeightMask.of_neurons(model.atlas, chosen(model, 0.1, 2), ("gate", "up"), model.fingerprint)
    checked(model, mixed, profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3"])
def test_single_weights_by_single_weights_of_the_same_tensors(arch: str, profile: Profile) -> None:
    """Where a mask of single weights was compared with whole neurons, a control was 69 times as large."""
    model = tiny_model(arch)
    source = torch.Generator().manual_seed(3)
    mask = WeightMask.of_elements(
        {name: torch.rand(shape, generator=source) < 0.01 for name, shape in shapes_of(model.module).items()},
        model.fingerprint,
    )
    drawn = checked(model, mask, profile)
    gate_up = "model.layers.0.mlp.gate_up_proj.weight"
    if arch == "phi3" and profile == "layers":
        d_mlp = model.atlas.d_mlp
        for one in drawn:
            dense, wanted = one.entries[gate_up].dense(), mask.entries[gate_up].dense()
            assert dense[:d_mlp].sum() == wanted[:d_mlp].sum(), "gate's weights by gate's"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_rows_by_rows_and_columns_by_columns(kind: str, profile: Profile) -> None:
    model = tiny_model("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    shape = shapes_of(model.module)[name]
    mask = WeightMask({name: Selection(kind, torch.tensor([0, 3, 5]), shape)}, model.fingerprint)  # type: ignore[arg-type]
    for one in checked(model, mask, profile):
        assert all(selection.kind == kind for selection in one.entries.values())


@pytest.mark.parametrize("arch", ["phi3", "gpt2", "neox"])
def test_queries_by_queries_in_a_fused_projection(arch: str) -> None:
    """Phi-3 and GPT-2 hold queries, keys and values behind each other, NeoX one head after the other."""
    model = tiny_model(arch)
    atlas = model.atlas
    name = {
        "phi3": "model.layers.0.self_attn.qkv_proj.weight",
        "gpt2": "transformer.h.0.attn.c_attn.weight",
        "neox": "gpt_neox.layers.0.attention.query_key_value.weight",
    }[arch]
    shape = shapes_of(model.module)[name]
    width, heads, groups = atlas.d_head, atlas.n_heads, atlas.n_kv_heads
    block = torch.arange((heads + 2 * groups) * width) // width
    part = (
        block % 3
        if arch == "neox"
        else torch.bucketize(block, torch.tensor([heads, heads + groups]), right=True)
    )
    asked = torch.cat([(part == 0).nonzero()[:5, 0], (part == 2).nonzero()[:3, 0]])
    kind = "columns" if arch == "gpt2" else "rows"
    mask = WeightMask({name: Selection(kind, asked, shape)}, model.fingerprint)  # type: ignore[arg-type]
    for one in checked(model, mask, "layers"):
        index = one.entries[name].index
        assert index is not None
        assert torch.bincount(part[index], minlength=3).tolist() == [5, 0, 3]


def test_whole_tensors_move_to_layers_where_the_mask_has_none() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]
    mask = WeightMask.of_parameters(names, shapes_of(model.module), model.fingerprint)
    for profile in PROFILES:
        drawn = control_masks(model, mask, 4, profile)
        assert len({one.digest for one in drawn}) == 4
        for one in drawn:
            assert not set(one.entries) & set(names)
            assert one.n_weights == mask.n_weights and per_kind(one) == per_kind(mask)
            assert all(selection.kind == "all" for selection in one.entries.values())


def test_a_bias_selected_whole_stays_with_its_neurons() -> None:
    """Mean ablation writes the located neurons' mean into the output bias of their layer."""
    model = tiny_model("gpt2")
    mask = WeightMask.of_neurons(model.atlas, chosen(model, 0.1), ("down",), model.fingerprint)
    bias = WeightMask.of_parameters(
        ["transformer.h.1.mlp.c_proj.bias"], shapes_of(model.module), model.fingerprint
    )
    for one in checked(model, mask | bias, "layers"):
        assert one.entries["transformer.h.1.mlp.c_proj.bias"].kind == "all"


def test_where_no_control_can_be_made_it_is_said() -> None:
    model = tiny_model("llama")
    shapes, fingerprint = shapes_of(model.module), model.fingerprint
    every = WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes, fingerprint)
    with pytest.raises(InputError, match=r"all of mlp\.down_proj\.weight in 3 of 3"):
        control_masks(model, every, 1)
    embedding = WeightMask.of_parameters(["model.embed_tokens.weight"], shapes, fingerprint)
    with pytest.raises(InputError, match="and the model has no other of its kind"):
        control_masks(model, embedding, 1)
    one = WeightMask.of_parameters(["model.layers.0.mlp.down_proj.weight"], shapes, fingerprint)
    assert len(control_masks(model, one, 2)) == 2
    with pytest.raises(InputError, match="no more than 2 controls can be made"):
        control_masks(model, one, 3)
    with pytest.raises(InputError, match="the mask is empty"):
        control_masks(model, WeightMask({}, fingerprint), 1)


def test_a_longer_list_begins_with_the_shorter_and_a_seed_draws_others() -> None:
    model = tiny_model("llama")
    mask = WeightMask.of_neurons(model.atlas, chosen(model, 0.1), ("down",), model.fingerprint)
    three, five = control_masks(model, mask, 3), control_masks(model, mask, 5)
    assert [m.digest for m in three] == [m.digest for m in five[:3]]
    assert control_masks(model, mask, 1, seed=1)[0].digest != three[0].digest


def test_the_layer_profile_is_kept_or_not_as_asked() -> None:
    model = tiny_model("llama")
    where = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    where[0, :12] = True
    mask = WeightMask.of_neurons(model.atlas, where, ("down",), model.fingerprint)
    for profile, layers in (("layers", 1), ("uniform", 3)):
        for one in control_masks(model, mask, 3, profile):  # type: ignore[arg-type]
            assert int((one.neurons_per_layer(model.atlas) > 0).sum()) == layers
