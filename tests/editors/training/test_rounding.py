"""Stochastic rounding is right on average; compensated training sees what is saved, and loses no small step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from editors.objectives.npo import NPO
from editors.training.parametrize import Deltas
from editors.training.retain import Retain
from editors.training.rounding import as_saved, saved_dtypes, stochastically_rounded
from editors.training.settings import Training
from locus.errors import InputError
from locus.forward import measure
from locus.mask import WeightMask
from locus.model import Model, load_model
from tests.editors.training.test_parametrize import logits, mask_of
from tests.tiny import save_tiny, tiny_facts, tiny_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expectation_is_the_exact_value(dtype: torch.dtype) -> None:
    """A quarter of the way from 1 to its next number: up in a quarter of the draws."""
    gap = torch.finfo(dtype).eps
    exact = torch.full((40_000,), 1 + gap / 4)
    rounded = stochastically_rounded(exact, dtype, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + gap}
    assert float((rounded > 1).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(rounded.to(dtype).float(), rounded)


def test_what_the_dtype_holds_stays() -> None:
    exact = torch.tensor([0.0, -1.5, 2.0**-120, 3.0])
    assert torch.equal(stochastically_rounded(exact, torch.bfloat16, torch.Generator()), exact)
    wide = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stochastically_rounded(wide, torch.float32, torch.Generator()), wide)


def test_negative_values_round_to_their_own_neighbours() -> None:
    gap = torch.finfo(torch.bfloat16).eps
    exact = torch.full((1000,), -(1 + gap / 2))
    rounded = stochastically_rounded(exact, torch.bfloat16, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {-1.0, -1.0 - gap}


def test_as_saved_by_hand() -> None:
    """Beside 1, bfloat16 has steps of 1/128: 1/300 is lost, 1/200 becomes 1/128;
    below it of 1/256: -1/100 becomes -3/256. The gradient is that of a sum."""
    delta = torch.tensor([1 / 300, 1 / 200, -1 / 100], requires_grad=True)
    new = as_saved(torch.ones(3, dtype=torch.bfloat16), delta, torch.bfloat16)
    assert new.tolist() == [1.0, 1 + 1 / 128, 1 - 3 / 256]
    (gradient,) = torch.autograd.grad((new * torch.tensor([1.0, 2.0, 3.0])).sum(), delta)
    assert gradient.tolist() == [1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def half(tmp_path_factory: Any) -> Model:
    """A bfloat16 checkpoint, loaded in float32."""
    folder = tmp_path_factory.mktemp("half")
    model = tiny_model("smollm")
    model.module.to(torch.bfloat16)
    return load_model(save_tiny(model, folder), dtype="float32")


@pytest.mark.parametrize("kind", ["rows", "columns", "elements", "all"])
def test_the_forward_sees_the_weights_as_they_will_be_saved(half: Model, kind: str) -> None:
    mask = mask_of(half.module, kind)
    saved = saved_dtypes(half, mask)
    assert set(saved.values()) == {torch.bfloat16}
    deltas = Deltas(half.module, mask, saved)
    source = torch.Generator().manual_seed(2)
    deltas.load({n: 0.02 * torch.randn(v.shape, generator=source) for n, v in deltas.values.items()})
    twin = load_model(half.folder, dtype="float32")  # type: ignore[arg-type]
    rounded = {n: e.to(torch.bfloat16).float() for n, e in deltas.new_entries().items()}
    for name, parameter in twin.module.named_parameters():
        deltas.selections[name].put_(parameter.data, rounded[name])
    with torch.no_grad(), deltas.attached():
        seen = logits(half.module)
    torch.testing.assert_close(seen, logits(twin.module), rtol=1e-4, atol=1e-4)


def edited(model: Model, rounding: str, tmp_path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Four steps of plain SGD, each far smaller than the spacing of bfloat16; and the records of five."""
    shape = {n: tuple(p.shape) for n, p in model.module.named_parameters()}
    mask = WeightMask.of_parameters(["*.mlp.*"], shape, model.fingerprint)
    training = Training(
        steps=4, optimizer="sgd", lr=0.01, clip=1.0, goal=0.0, utility=0.0, floor=0.0,
        rounding=rounding,  # type: ignore[arg-type]
    )  # fmt: skip
    history: list[dict[str, Any]] = []
    editor = NPO(retain=Retain(term="none"), training=training)
    delta = editor.run(model, tiny_facts(), [], mask, log=history.append)  # type: ignore[arg-type]
    one_more = dataclasses.replace(editor, training=dataclasses.replace(training, steps=5))
    more: list[dict[str, Any]] = []
    one_more.run(model, tiny_facts(), [], mask, log=more.append)  # type: ignore[arg-type]
    return delta, more


def test_compensated_training_knows_what_it_saves_and_carries_small_steps_on(
    half: Model, tmp_path: Path
) -> None:
    """The probability that step 5 finds is that of the weights saved after step 4; to the nearest it is not."""
    gaps = {}
    for rounding in ("nearest", "compensated"):
        delta, records = edited(half, rounding, tmp_path)
        assert delta.rounding.n_vanished > 0
        with delta.applied(half):
            prob = float(measure(half, tiny_facts()).prob.mean())
        gaps[rounding] = abs(prob / records[4]["forget_prob"] - 1)
        assert len(delta.changes) > 0
    assert gaps["compensated"] < 1e-4 < gaps["nearest"]


def test_lora_and_compensation_do_not_go_together() -> None:
    with pytest.raises(InputError, match=r"compensated.*LoRA"):
        Training(lora_rank=2, rounding="compensated")
