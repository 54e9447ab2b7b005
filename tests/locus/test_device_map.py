"""A model that accelerate spreads: part of its weights stay on the disk and come only while they are needed.

Two devices are not needed for that: what is offloaded is on no device between calls, and nothing may be computed with
it but by its own module.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editors import NPO, ROME
from editors.training.settings import Training
from locus.errors import InputError
from locus.lens import lens_grid
from locus.mask import WeightMask
from locus.model import Model, load_model
from locus.tokens import encode
from tests.editors.direct_edits import down
from tests.editors.training.test_finetune import TEXT, known_facts, same
from tests.tiny import save_tiny, tiny_facts, tiny_model
from tests.together.test_shared_localizers import localizers, scored
from tracing import CausalTrace, WeightSaliency

OFFLOADED = ("model.embed_tokens", "model.layers.1", "model.norm", "lm_head")
READ_WEIGHTS = ("activation-norm", "imprint", "direct-logit", "fact-lookup", "largest-norm")
"""Localizers that look at weights themselves, beside what flows."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """The model on one device, and spread."""
    folder = save_tiny(tiny_model("llama"), tmp_path_factory.mktemp("mapped"))
    parts = ["model.rotary_emb", *(f"model.layers.{i}" for i in range(3)), *OFFLOADED]
    spread = load_model(
        folder, device_map={**dict.fromkeys(parts, "cpu"), **dict.fromkeys(OFFLOADED, "disk")}
    )
    away = [name for name, p in spread.module.named_parameters() if p.is_meta]
    assert all(any(name.startswith(part) for name in away) for part in OFFLOADED)
    assert spread.device == torch.device("cpu")
    return load_model(folder), spread


@pytest.mark.parametrize("how", [{"engine": "replay"}, {"engine": "plain"}, {"method": "attribution"}])
def test_it_is_traced_as_on_one_device(pair: tuple[Model, Model], how: dict[str, Any]) -> None:
    kinds = ("block", "mlp", "query:0") if "method" in how else ("block", "attn", "block-no-mlp", "head:1")
    one, spread = (CausalTrace(samples=2, kinds=kinds, **how).run(m, tiny_facts()[:1]) for m in pair)
    assert one.engines == spread.engines and one.fingerprint == spread.fingerprint
    for ours, theirs in zip(one, spread, strict=True):
        assert all(torch.equal(ours.scores[kind], theirs.scores[kind]) for kind in kinds)


def test_it_is_read_through_the_lens_as_on_one_device(pair: tuple[Model, Model]) -> None:
    one, spread = (lens_grid(m, encode(m, tiny_facts()[0]), "tower") for m in pair)
    assert torch.equal(one.prob, spread.prob) and torch.equal(one.rank, spread.rank)


@pytest.mark.parametrize("name", ["saliency", "depn", "zero-out", *READ_WEIGHTS])
def test_neurons_are_scored_as_on_one_device(pair: tuple[Model, Model], name: str) -> None:
    one, spread = (scored(localizers()[name], m, tiny_facts()[:1])["neurons"] for m in pair)
    assert torch.equal(one, spread)


def test_scores_of_weights_that_are_away_are_refused(pair: tuple[Model, Model]) -> None:
    with pytest.raises(InputError, match=r"embed_tokens\.weight: offloaded, so it has no gradient"):
        WeightSaliency().run(pair[1], tiny_facts())
    WeightSaliency(parameters=("model.layers.0.mlp.*",)).run(pair[1], tiny_facts()[:1])


def test_what_is_in_memory_is_edited_as_on_one_device_and_what_is_not_is_refused(
    pair: tuple[Model, Model],
) -> None:
    one, spread = pair
    facts = known_facts(one)
    training = Training(steps=2, optimizer="sgd", lr=0.05, goal=0.0)
    editor = NPO(training=training)
    edited = [editor.run(model, *facts, down(model, 0, 2), text=TEXT) for model in pair]
    assert same(*edited)
    away = next(name for name, p in spread.module.named_parameters() if p.is_meta)
    mask = WeightMask.of_parameters([away], {n: tuple(p.shape) for n, p in spread.module.named_parameters()})
    with pytest.raises(InputError, match="offloaded"):
        editor.run(spread, *facts, mask, text=TEXT)
    change = editor.run(one, *facts, mask, text=TEXT)
    with (
        pytest.raises(InputError, match="offloaded, so it cannot be changed in memory"),
        change.applied(spread),
    ):
        pass


def test_a_direct_edit_of_an_offloaded_projection_is_refused(pair: tuple[Model, Model]) -> None:
    spread = pair[1]
    with pytest.raises(InputError, match=r"layers\.1.*offloaded, so it cannot be changed in memory"):
        ROME().run(spread, tiny_facts()[:1], [], down(spread, 1))
