"""Patching and recording, on a model small enough to work out by hand and on the whole zoo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from locus.errors import InputError
from locus.hooks import StopForward, patched, record, record_results, skipped, stop_after
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model


class Scale(nn.Module):
    """x -> factor * x, answering with a tuple when asked to."""

    def __init__(self, factor: float, as_tuple: bool = False) -> None:
        super().__init__()
        self.factor, self.as_tuple = nn.Parameter(torch.tensor(factor), requires_grad=False), as_tuple

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, str]:
        y = self.factor * hidden_states
        return (y, "kept") if self.as_tuple else y


class Block(nn.Module):
    """x + 3 * (2 * x), called by keyword, returned in a tuple, added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Scale(2.0, as_tuple=True)
        self.mlp = Scale(3.0)

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        twice, said = self.attn(hidden_states=x)
        assert said == "kept"
        out = self.mlp(twice)
        out += x
        return out


class Rows(nn.Module):
    """Runs its MLP on flattened rows, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Scale(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.reshape(-1, x.shape[-1])).view(x.shape)


class Micro(nn.Module):
    """Two blocks (7x each), then rows (3x): 147x in all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.rows = Rows()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.rows(x)


ONES = torch.ones(2, 3, 1)  # batch 2, pos 3, d 1


def test_nothing_patched_is_the_model() -> None:
    assert torch.equal(Micro()(ONES), 147 * ONES)


@pytest.mark.parametrize(
    ("outputs", "inputs", "expected"),
    [
        ({"blocks.0.mlp": torch.zeros_like}, {}, 21),  # block 0 passes x on: 1 * 7 * 3
        ({"blocks.0.attn": lambda t: t + 1}, {}, 210),  # block 0: 1 + 3 * (2 + 1) = 10
        ({"blocks.1": lambda t: None}, {}, 147),
        ({}, {"blocks.1": lambda t: t + 1}, 168),  # 8 * 7 * 3
        ({}, {"blocks.0.attn": torch.zeros_like}, 21),  # a keyword argument
        ({}, {"blocks.0.attn": lambda t: None}, 147),
        ({"rows.mlp": lambda t: t + 1}, {"rows.mlp": lambda t: 2 * t}, 295),  # 3 * (2 * 49) + 1
    ],
)
def test_patches_by_hand(outputs: dict, inputs: dict, expected: float) -> None:
    model = Micro()
    with patched(model, outputs, inputs):
        assert torch.equal(model(ONES), expected * ONES)
    assert torch.equal(model(ONES), 147 * ONES)


def test_nested_patches_run_outermost_first() -> None:
    model = Micro()
    with (
        patched(model, {"blocks.0": lambda t: t + 1}),  # 7 + 1
        record(model, ["blocks.0"]) as seen,
        patched(model, {"blocks.0": lambda t: 2 * t}),  # 2 * 8
    ):
        assert torch.equal(model(ONES), 16 * 21 * ONES)
    assert torch.equal(seen.outputs["blocks.0"], 8 * ONES)


def test_record_by_hand() -> None:
    """Values survive the context and the in-place addition to mlp's output inside the block."""
    model = Micro()
    with record(
        model, ["blocks.0.attn", "blocks.0.mlp", "blocks.0"], ["blocks.0.mlp", "blocks.1.attn"]
    ) as seen:
        model(ONES)
    outputs = {name: t.flatten()[0].item() for name, t in seen.outputs.items()}
    inputs = {name: t.flatten()[0].item() for name, t in seen.inputs.items()}
    assert outputs == {"blocks.0.attn": 2, "blocks.0.mlp": 6, "blocks.0": 7}
    assert inputs == {"blocks.0.mlp": 2, "blocks.1.attn": 7}


def test_rows_come_as_batch_and_positions() -> None:
    """A module inside that sees [batch * pos, d] is patched and recorded as [batch, pos, d]."""
    model = Micro()

    def second_prompt_last_position(tensor: Tensor) -> Tensor:
        assert tensor.shape == (2, 3, 1)
        tensor = tensor.clone()
        tensor[1, 2] = 0
        return tensor

    with (
        patched(model, {"rows.mlp": second_prompt_last_position}),
        record(model, ["rows.mlp"], ["rows.mlp"]) as seen,
    ):
        out = model(ONES)
    assert out.flatten().tolist() == [147, 147, 147, 147, 147, 0]
    assert torch.equal(seen.outputs["rows.mlp"], out)
    assert torch.equal(seen.inputs["rows.mlp"], 49 * ONES)


def test_record_without_detach_gives_the_gradient() -> None:
    """With all weights frozen; d(sum of output) / d(block 0's mlp) = 7 * 3, whatever is added in place."""
    model = Micro()
    with record(model, ["blocks.0.mlp"], ["blocks.1"], detach=False) as seen:
        loss = model(ONES).sum()
    at_mlp, at_block = torch.autograd.grad(loss, [seen.outputs["blocks.0.mlp"], seen.inputs["blocks.1"]])
    assert torch.equal(at_mlp, 21 * ONES)
    assert torch.equal(at_block, 21 * ONES)
    assert torch.equal(seen.outputs["blocks.0.mlp"], 6 * ONES)


def test_record_detached_keeps_no_graph() -> None:
    model = Micro()
    with record(model, ["blocks.0"]) as seen:
        model(ONES.clone().requires_grad_())
    assert not seen.outputs["blocks.0"].requires_grad


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("blocks.2", "near: blocks.1"),
        ("blocks.0.mlp.factor", "near: blocks.0.mlp"),  # a parameter is no module
        ("zzz", "names look like rows.mlp"),
        ("", "names look like rows.mlp"),
    ],
)
def test_wrong_names_register_nothing(wrong: str, hint: str) -> None:
    model = Micro()
    for context in (
        lambda: patched(model, {"blocks.0": torch.zeros_like, wrong: torch.zeros_like}),
        lambda: patched(model, {"blocks.0": torch.zeros_like}, {wrong: torch.zeros_like}),
        lambda: record(model, ["blocks.0", wrong]),
        lambda: stop_after(model, wrong),
    ):
        with pytest.raises(InputError, match=hint) as error, context():
            pytest.fail("entered")
        assert f'Micro has no module "{wrong}"' in str(error.value)
        assert not hooks_of(model)


def hooks_of(model: nn.Module) -> list[object]:
    return [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_undone_whatever_happens() -> None:
    """An exception in the body, in a patch, in the model; each leaves no hook and reaches the caller."""
    model = Micro()

    def fail(tensor: Tensor) -> Tensor:
        raise RuntimeError("in a patch")

    with pytest.raises(ZeroDivisionError), patched(model, {"blocks.0": fail}), record(model, ["rows"]):
        assert hooks_of(model)
        _ = 1 / 0
    assert not hooks_of(model)
    with (
        pytest.raises(RuntimeError, match="in a patch"),
        patched(model, {"blocks.0": fail}),
        record(model, ["rows"]),
    ):
        model(ONES)
    assert not hooks_of(model)
    with (
        pytest.raises(RuntimeError, match="in a patch"),
        stop_after(model, "rows"),
        patched(model, {"blocks.0": fail}),
    ):
        model(ONES)
    assert not hooks_of(model)


def test_a_module_that_returns_no_tensor_is_named() -> None:
    model = Micro()
    model.rows.mlp.forward = lambda x: {"y": x}  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError, match="Scale returned dict"), record(model, ["rows.mlp"]):
        model(ONES)


def test_stop_after_runs_nothing_further() -> None:
    model = Micro()
    ran = []
    reached = False
    with (
        patched(model, {"blocks.1": ran.append}),
        record(model, ["blocks.0", "rows"]) as seen,
        stop_after(model, "blocks.0"),
    ):
        model(ONES)
        reached = True
    assert not reached and not ran
    assert list(seen.outputs) == ["blocks.0"]
    assert not hooks_of(model)


def test_stop_after_lets_other_stops_pass() -> None:
    """Of two nested stops the earlier module wins, and only its own context ends."""
    model = Micro()
    after_inner = False
    with stop_after(model, "blocks.0"):
        with stop_after(model, "blocks.1"):
            model(ONES)
        after_inner = True
    assert not after_inner
    with pytest.raises(StopForward), stop_after(model, "blocks.0"):
        raise StopForward("somebody else's")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_patching_what_was_recorded_changes_nothing(arch: str) -> None:
    """At every site at once, bit for bit; and the last block's output of another prompt brings its logits."""
    model = tiny_model(arch)
    atlas = model.atlas
    prompts = [model.tokenizer(fact.prompt, return_tensors="pt").input_ids[:, :6] for fact in tiny_facts()]
    outputs = [*atlas.blocks, *atlas.attn_out, *atlas.mlp_out]
    inputs = [*atlas.blocks, *atlas.attn_z, *atlas.neuron_in]
    with torch.no_grad():
        with record(model.module, outputs, inputs) as seen:
            logits = model.module(prompts[0]).logits

        def with_recorded(names: list[str], tensors: dict[str, Tensor]) -> dict:
            return {
                name: lambda t, new=tensors[name]: new if new.shape == t.shape else 1 / 0 for name in names
            }

        with patched(model.module, with_recorded(outputs, seen.outputs), with_recorded(inputs, seen.inputs)):
            again = model.module(prompts[0]).logits
        with patched(model.module, with_recorded([atlas.blocks[-1]], seen.outputs)):
            other = model.module(prompts[1]).logits
    assert torch.equal(again, logits)
    assert torch.equal(other, logits)
    assert not torch.allclose(model.module(prompts[1]).logits, logits, atol=1e-2)


def test_results_are_kept_as_they_were_returned() -> None:
    model = Micro()
    with record_results(model, ["blocks.0.attn", "blocks.1"]) as results:
        model(ONES)
    value, said = results["blocks.0.attn"]
    assert torch.equal(value, 2 * ONES)
    assert said == "kept"
    assert torch.equal(results["blocks.1"], 49 * ONES)


def test_skipped_modules_are_not_run() -> None:
    """Neither they nor what is inside them; a forward of a module's own comes back with the rest."""
    model = Micro()
    own = model.rows.forward
    model.rows.forward = lambda x: own(x) + 1  # as accelerate does it
    with (
        record_results(model, ["blocks.0", "blocks.0.attn"]) as results,
        skipped(model, {"blocks.0": 5 * ONES, "blocks.1.attn": (ONES, "kept")}),
    ):
        assert torch.equal(model(ONES), (3 * (3 * 1 + 5) + 1) * ONES)
    assert list(results) == ["blocks.0"]
    assert torch.equal(model(ONES), 148 * ONES)
    with skipped(model, {"rows": 2 * ONES}):
        assert torch.equal(model(ONES), 2 * ONES)
    assert torch.equal(model(ONES), 148 * ONES)
    assert all("forward" not in vars(block) for block in model.blocks)
    with pytest.raises(InputError, match="no module"), skipped(model, {"blocks.0": ONES, "block.1": ONES}):
        pass
    assert "forward" not in vars(model.blocks[0])
