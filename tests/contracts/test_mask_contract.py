"""The mask contract for every objective, kind of selection and optimizer: nothing outside moves by a bit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from editors import EDITORS, OBJECTIVES
from editors.objectives.lens_defence import HeadProjection
from editors.training.retain import Retain
from editors.training.settings import Training
from editors.training.unchanged import every_digest
from locus.delta import WeightDelta
from locus.elicitation.elicit import Elicitation
from locus.fact import Fact
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from tests.editors.direct_edits import QUICK, TEXT
from tests.tiny import tiny_facts, tiny_model

FIVE = ("smollm", "gpt2", "gemma2", "neox", "phi3")
KINDS = ("rows", "columns", "elements", "all")
OPTIMIZERS = ("adamw", "sgd", "sophia")


@functools.cache
def model_of(arch: str) -> Model:
    return tiny_model(arch, num_hidden_layers=2) if arch != "gpt2" else tiny_model(arch, n_layer=2)


def mask_of(model: Model, kinds: tuple[str, ...]) -> WeightMask:
    """Every parameter in turn in one of the kinds; of each, about a quarter of its entries."""
    source = torch.Generator().manual_seed(3)
    entries: dict[str, Selection] = {}
    for (name, p), kind in zip(model.module.named_parameters(), itertools.cycle((*kinds, "")), strict=False):
        if not kind:
            continue  # every so often a whole parameter stays outside
        own = "rows" if p.dim() == 1 and kind == "columns" else kind
        n = p.numel() if own == "elements" else p.shape[1 if own == "columns" else 0]
        index = None if own == "all" else torch.randperm(n, generator=source)[: max(1, n // 4)]
        entries[name] = Selection(own, index, tuple(p.shape))
    return WeightMask(entries)


def facts() -> tuple[list[Fact], list[Fact]]:
    *forget, kept = (dataclasses.replace(fact, held_out=False) for fact in tiny_facts())
    return forget, [kept]


def rough(editor: type, optimizer: str, **settings: Any) -> Any:
    """An editor at rough settings, decay and momentum on, that runs for two steps."""
    training = Training(
        steps=2,
        lr=0.05,
        optimizer=optimizer,  # type: ignore[arg-type]
        weight_decay=0.1,
        momentum=0.9,
        utility=0.0,
        max_kl=0.0,
        goal=0.0,
        floor=0.0,
        **settings,
    )
    made = editor(training=training)
    if editor is HeadProjection:  # a random model's targets lie where it wants them already
        made = dataclasses.replace(made, margin=10.0)
    if hasattr(made, "retain"):
        made = dataclasses.replace(made, retain=dataclasses.replace(made.retain, facts=1, texts=0))
    return made


def assert_contract(model: Model, mask: WeightMask, editor: Any, text: tuple[str, ...] = ()) -> WeightDelta:
    """Run, and look at every weight of the edited model without trusting the delta's own bookkeeping."""
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    forget, retain = facts()
    delta: WeightDelta = editor.run(model, forget, retain, mask, text=text)
    for name, p in model.module.named_parameters():
        assert torch.equal(p, before[name]), f"{name} moved in memory"
    with delta.applied(model):
        moved = 0
        for name, p in model.module.named_parameters():
            inside = (
                mask.entries[name].dense() if name in mask.entries else torch.zeros(p.shape, dtype=torch.bool)
            )
            assert torch.equal(p[~inside], before[name][~inside]), f"{name} moved outside the mask"
            moved += int((p != before[name]).sum())
    assert moved > 0
    assert not any("forward" in m.__dict__ for m in model.module.modules())
    return delta


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", FIVE)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_and_optimizer_on_a_mask_of_all_kinds(name: str, arch: str, optimizer: str) -> None:
    model = model_of(arch)
    assert_contract(model, mask_of(model, KINDS), rough(OBJECTIVES[name], optimizer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", FIVE)
def test_every_kind_alone(arch: str, kind: str, optimizer: str) -> None:
    model = model_of(arch)
    assert_contract(model, mask_of(model, (kind,)), rough(OBJECTIVES["npo"], optimizer))


@pytest.mark.parametrize("name", ["whp", "task-vector"])
def test_methods_of_two_stages(name: str) -> None:
    model = model_of("smollm")
    assert_contract(model, mask_of(model, KINDS), rough(EDITORS[name], "adamw"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_half_precision(dtype: torch.dtype, rounding: str) -> None:
    model = tiny_model("smollm", num_hidden_layers=2)
    model.module.to(dtype)
    editor = rough(OBJECTIVES["npo"], "adamw", rounding=rounding)
    delta = assert_contract(model, mask_of(model, KINDS), editor)
    assert {change.new.dtype for change in delta.changes.values()} == {dtype}


def test_the_retain_term_of_hidden_states_too() -> None:
    model = model_of("gpt2")
    editor = dataclasses.replace(
        rough(OBJECTIVES["npo"], "adamw"), retain=Retain(term="hidden", facts=1, texts=0)
    )
    assert_contract(model, mask_of(model, KINDS), editor)


DIRECT: dict[str, dict[str, Any]] = {
    "rome": {"target": QUICK, "ridge": 0.1},
    "memit": {"target": QUICK, "layers": ()},
    "alphaedit": {"target": QUICK},
    "law": {"target": QUICK, "rounds": 1},
    "late-suppression": {
        "elicitation": Elicitation(rewritings=0, lists=0, texts=1, text_tokens=4),
        "goal": 1e-4,
        "weight": 0.01,
        "rounds": 1,
        "look_ahead": 0,
    },
    "neuron-zero": {},
    "neuron-flip": {},
    "neuron-mean": {},
    "neuron-direction": {"towards": "noise"},
    "neuron-selective": {"weight": 0.1, "prefixes": 0},
    "neuron-descent": {"prefixes": 0, "prob_stop": 1e-9, "rounds": 1},
    "knowledge-neurons": {"recipe": "erase"},
    "depn": {},
    "projection": {"protect": 1, "prefixes": 0},
}


def down_mask(model: Model, kind: str) -> WeightMask:
    """A quarter of every down projection in one of the kinds, and all of the output biases."""
    source = torch.Generator().manual_seed(5)
    shapes = {name: tuple(p.shape) for name, p in model.module.named_parameters()}
    entries: dict[str, Selection] = {}
    for part in (part for layer in model.atlas.neurons for part in layer if part.role == "down"):
        shape = shapes[part.param]
        n = shape[0] * shape[1] if kind == "elements" else shape[1 if kind == "columns" else 0]
        index = None if kind == "all" else torch.randperm(n, generator=source)[: max(1, n // 4)]
        entries[part.param] = Selection(kind, index, shape)  # type: ignore[arg-type]
        bias = part.param.removesuffix("weight") + "bias"
        if bias in shapes:
            entries[bias] = Selection("all", None, shapes[bias])
    return WeightMask(entries, model.fingerprint)


@pytest.mark.parametrize(
    ("arch", "kind"), [*zip(FIVE, itertools.cycle(KINDS), strict=False), ("neox", "elements")]
)
@pytest.mark.parametrize("name", DIRECT)
def test_direct_edits(name: str, arch: str, kind: str, monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))
    model = model_of(arch)
    assert_contract(model, down_mask(model, kind), EDITORS[name](**DIRECT[name]), TEXT)


def test_every_direct_edit_is_tested() -> None:
    assert set(DIRECT) == {name for name, editor in EDITORS.items() if not hasattr(editor, "training")}


def test_every_digest_sees_one_bit() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    before = every_digest(model.module)
    weight = model.module.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    after = every_digest(model.module)
    assert [name for name in before if before[name] != after[name]] == ["model.layers.0.mlp.up_proj.weight"]
