"""Every localizer of the table: the same call, the same kind of answer, a mask that an editor takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from locus.cli.methods import about, localizer_page
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.model import Model
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tests.tracing.localizers.test_lookup_probe import letters
from tracing import LOCALIZERS
from tracing.engine import Engine
from tracing.localizer import Localizer


@dataclass
class Counted:
    """Passes of one example through the whole model: rows of blocks, divided by an example's rows of all blocks."""

    forwards: float = 0.0
    backwards: float = 0.0


@contextmanager
def counted(model: Model, facts: Sequence[Fact]) -> Iterator[Counted]:
    """Count what goes through the blocks, forwards and backwards; padding must not occur."""
    lengths = [len(encode(model, fact).ids) for fact in facts]
    whole = model.atlas.n_layers * sum(lengths) / len(lengths)
    found, handles = Counted(), []

    def forward(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.forwards += hidden.shape[0] * hidden.shape[1] / whole

    def after(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        found.backwards += gradient.shape[0] * gradient.shape[1] / whole

    for name in model.atlas.blocks:
        block = model.module.get_submodule(name)
        handles.append(block.register_forward_pre_hook(forward, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", LOCALIZERS)
def test_every_localizer_gives_a_mask_of_its_model(name, arch):
    model = tiny_model(arch)
    facts = letters() if name == "lookup-probe" else tiny_facts()  # the probe needs answers that facts share
    localizer = LOCALIZERS[name]()
    scores = localizer.run(model, facts[:2], facts[2:])
    assert scores.method == name
    mask = scores.top(7)
    mask.check(model)
    assert mask.provenance["method"] == name
    if name == "weight-saliency":
        assert mask.n_weights == 7
    elif name == "contrastive-vectors":
        assert sum(len(entry.index) for entry in mask.entries.values()) == 7
    elif name == "disagreeing-tensors":
        assert len(mask.entries) == 7 and all(entry.kind == "all" for entry in mask.entries.values())
    else:
        assert int(mask.neurons_per_layer(model.atlas).sum()) == 7
    with pytest.raises(InputError, match="budget"):
        scores.top(0)


LONG = "The people of the city of Rome and of the city of Paris and of the people of Spain say the Eiffel Tower is in"
SHORT_RUNS: dict[str, dict[str, Any]] = {
    "slimming": {"steps": 3},
    "hard-concrete": {"steps": 3},
    "zero-out": {"candidates": 1.0},
    "weight-saliency": {"score": "difference"},
    "saliency": {"contrast": "ratio"},
}
"""Settings for which the cost is exact in a test: no early stop, no choice of candidates."""


def even_facts() -> list[Fact]:
    """Facts of one length, with a paraphrase and a neighbour of that length, so that no batch is padded."""
    fact = Fact(id="0", prompt=LONG, target=" Paris", subject="Eiffel Tower", paraphrases=(LONG,))
    fact = replace(fact, neighbours=(Example(LONG, " Rome"),), alternatives=(" Rome",))
    return [replace(fact, id=str(number)) for number in range(3)]


@pytest.mark.parametrize("name", LOCALIZERS)
def test_the_cost_is_what_goes_through_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 10 %: the last target token is run by some localizers and left out by others.

    The replay engine's check of itself, a few forwards a run, is left out: it is no part of the method.
    """
    monkeypatch.setattr(Engine, "_check", lambda *_: None)
    model = tiny_model("llama")
    forget, retain = (letters(), []) if name == "lookup-probe" else (even_facts()[:2], even_facts()[2:])
    localizer = LOCALIZERS[name](**SHORT_RUNS.get(name, {}))
    told = localizer.cost(model, forget, retain)
    with counted(model, forget) as found:
        localizer.run(model, forget, retain)
    assert told.forwards == pytest.approx(found.forwards, rel=0.1)
    assert told.backwards == pytest.approx(found.backwards, rel=0.1)
    assert isinstance(localizer, Localizer)


@pytest.mark.parametrize("name", LOCALIZERS)
def test_the_first_line_of_the_docstring_says_what_it_does(name):
    line = (LOCALIZERS[name].__doc__ or "").strip().split("\n")[0]
    assert line.endswith(".") and 20 < len(line) < 120


@pytest.mark.parametrize("name", LOCALIZERS)
def test_its_page_says_formula_source_cost_and_use(name):
    text = about(LOCALIZERS[name])
    assert "Cost" in text and re.search(r"\b[Uu]se\b", text), text
    assert re.search(r"\b(19|20)\d\d\b", text) or "of ours" in text  # a paper, or said to be ours
    assert re.search(r"[=|/*]|sum|mean|cosine", text)


def test_the_page_of_all_localizers_is_up_to_date():
    page = Path(__file__).parents[2] / "tracing" / "README.md"
    assert page.read_text(encoding="utf-8") == localizer_page(LOCALIZERS), (
        "write it again: locus methods --markdown > tracing/README.md"
    )
