"""Deltas beside a frozen base compute what the edited weights would, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from editors.training.parametrize import Deltas
from locus.errors import InputError
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from tests.tiny import ARCHITECTURES, tiny_model

IDS = torch.tensor([[5, 9, 2, 31, 7, 7], [1, 40, 33, 2, 9, 5]])


def mask_of(module: nn.Module, kind: str) -> WeightMask:
    """About a third of every parameter of the model, in selections of one kind (vectors: rows)."""
    entries: dict[str, Selection] = {}
    source = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        own = "rows" if p.dim() == 1 and kind == "columns" else kind
        n = p.numel() if own == "elements" else p.shape[1 if own == "columns" else 0]
        index = None if own == "all" else torch.randperm(n, generator=source)[: max(1, n // 3)]
        entries[name] = Selection(own, index, tuple(p.shape))
    return WeightMask(entries)


def randomized(model: Model, mask: WeightMask) -> Deltas:
    """Deltas of about a tenth of the weights' size."""
    deltas = Deltas(model.module, mask)
    source = torch.Generator().manual_seed(2)
    deltas.load({n: 0.05 * torch.randn(v.shape, generator=source).to(v) for n, v in deltas.values.items()})
    return deltas


def edited_copy(model: Model, deltas: Deltas) -> nn.Module:
    """The model with base plus delta written into its weights."""
    twin = copy.deepcopy(model.module)
    new = deltas.new_entries()
    for name, parameter in twin.named_parameters():
        if name in new:
            deltas.selections[name].put_(parameter.data, new[name])
    return twin


def logits(module: nn.Module) -> Tensor:
    return module(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", ["rows", "columns", "elements", "all"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attached_deltas_compute_what_edited_weights_compute(arch: str, kind: str) -> None:
    model = tiny_model(arch)
    plain = logits(model.module)
    deltas = randomized(model, mask_of(model.module, kind))
    with torch.no_grad(), deltas.attached():
        attached = logits(model.module)
        with deltas.silenced():
            assert torch.equal(logits(model.module), plain)
    expected = logits(edited_copy(model, deltas))
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(attached, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model.module), plain)


@pytest.mark.parametrize("kind", ["rows", "columns", "elements", "all"])
@pytest.mark.parametrize("arch", ["smollm", "gpt2", "gemma2", "phi3", "opt"])
def test_delta_gradients_are_the_located_entries_of_the_full_gradient(arch: str, kind: str) -> None:
    model = tiny_model(arch)
    deltas = randomized(model, mask_of(model.module, kind))
    with deltas.attached():
        logits(model.module).log_softmax(-1)[..., 3].sum().backward()
    assert all(p.grad is None for p in model.module.parameters())
    twin = edited_copy(model, deltas).requires_grad_(True)
    logits(twin).log_softmax(-1)[..., 3].sum().backward()
    full = {name: p.grad for name, p in twin.named_parameters()}
    for name, value in deltas.values.items():
        assert value.grad is not None, name
        expected = deltas.selections[name].take(full[name])
        torch.testing.assert_close(
            value.grad, expected, rtol=1e-3, atol=1e-5 + 1e-3 * float(full[name].abs().max())
        )


def test_module_has_its_own_forwards_again_even_after_an_error() -> None:
    model = tiny_model("gpt2")
    deltas = Deltas(model.module, mask_of(model.module, "rows"))
    parameters = {name: id(p) for name, p in model.module.named_parameters()}
    with pytest.raises(IndexError), deltas.attached():
        model.module(input_ids=torch.tensor([[10**6]]))
    assert not any("forward" in m.__dict__ for m in model.module.modules())
    assert parameters == {name: id(p) for name, p in model.module.named_parameters()}
    assert list(parameters) == [name for name, _ in model.module.named_parameters()]


def test_deltas_of_a_half_precision_base_are_float32() -> None:
    model = tiny_model("smollm")
    model.module.to(torch.bfloat16)
    deltas = randomized(model, mask_of(model.module, "rows"))
    assert {v.dtype for v in deltas.values.values()} == {torch.float32}
    assert {v.dtype for v in deltas.new_entries().values()} == {torch.bfloat16}
    with torch.no_grad(), deltas.attached():
        attached = logits(model.module)
    error = (attached - logits(edited_copy(model, deltas))).float().abs().mean()
    assert error < 0.05 * attached.float().abs().mean()


def test_nothing_below_the_lowest_located_layer_is_differentiated() -> None:
    model = tiny_model("llama")
    name = model.atlas.neurons[2][0].param
    deltas = Deltas(
        model.module, WeightMask.of_parameters([name], {name: model.module.get_parameter(name).shape})
    )
    states: list[Tensor] = []
    hook = model.module.get_submodule(model.atlas.blocks[1]).register_forward_hook(
        lambda _module, _args, output: states.append(output if isinstance(output, Tensor) else output[0])
    )
    with deltas.attached():
        out = logits(model.module)
    hook.remove()
    assert out.requires_grad and not states[0].requires_grad


def test_no_gradient_as_large_as_a_located_matrix_is_formed() -> None:
    """Of every tensor that the backward pass makes none has the shape of a weight; rows and columns need none."""
    model = tiny_model("llama")
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[:, ::5] = True
    deltas = Deltas(model.module, WeightMask.of_neurons(model.atlas, chosen))
    held = {
        p.untyped_storage().data_ptr() for p in model.module.parameters()
    }  # a transposed weight is no new one
    made: list[tuple[int, ...]] = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
                made.append(tuple(out.shape))
            return out

    with deltas.attached():
        loss = logits(model.module).sum()
        with Shapes():
            loss.backward()
    weights = {tuple(p.shape) for p in model.module.parameters() if p.dim() == 2}
    assert made and not weights & {*made, *(shape[::-1] for shape in made)}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("no.such.weight", (3,), "no such parameter"), ("model.norm.weight", (7,), "made for shape")],
)
def test_a_mask_of_another_model_is_refused_by_name(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Deltas(tiny_model("llama").module, WeightMask({name: Selection("all", None, shape)}))


def test_one_tied_tensor_under_two_names_is_refused() -> None:
    module = tiny_model("smollm").module
    shape = tuple(module.lm_head.weight.shape)
    both = {n: Selection("all", None, shape) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(InputError, match="one tied tensor twice"):
        Deltas(module, WeightMask(both))
