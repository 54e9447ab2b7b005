"""Every localizer of the table: the same call, the same kind of answer, a mask that an editor takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from locus.cli.methods import about, localizer_page
from locus.errors import InputError
from tests.tiny import tiny_facts, tiny_model
from tests.tracing.localizers.test_lookup_probe import letters
from tracing import LOCALIZERS


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", LOCALIZERS)
def test_every_localizer_gives_a_mask_of_its_model(name, arch):
    model = tiny_model(arch)
    facts = letters() if name == "lookup-probe" else tiny_facts()  # the probe needs answers that facts share
    localizer = LOCALIZERS[name]()
    cost = localizer.cost(model, facts[:2], facts[2:])
    assert cost.forwards >= 0 and cost.backwards >= 0
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
