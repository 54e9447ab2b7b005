"""Localizers of several processes: one process's scores, to the bit where results can be handed round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from locus.errors import InputError
from locus.fact import Fact
from locus.hooks import patched
from locus.model import Model
from locus.parallel.map import together
from locus.parallel.ranks import joined
from tests.tiny import tiny_facts, tiny_model
from tests.together.forked import job
from tests.tracing.localizers.test_lookup_probe import letters
from tracing import (
    LOCALIZERS,
    GradientSaliency,
    HardConcrete,
    KnowledgeNeurons,
    LookupProbe,
    PrivacyNeurons,
    Slimming,
    WeightSaliency,
    ZeroOut,
)

QUICK: dict[str, Any] = {
    "knowledge-neurons": KnowledgeNeurons(steps=2),
    "depn": PrivacyNeurons(steps=2),
    "slimming": Slimming(steps=2),
    "hard-concrete": HardConcrete(steps=2),
    "zero-out": ZeroOut(candidates=0.05),
}
BY_WEIGHT = ("weight-saliency", "contrastive-vectors", "disagreeing-tensors", "fisher")
"""Gradients of all weights are too large to be handed round: their sums agree within rounding."""


def localizers() -> dict[str, Any]:
    found = {name: QUICK.get(name) or cls() for name, cls in LOCALIZERS.items()}
    return {**found, "fisher": WeightSaliency(score="fisher")}


def scored(localizer: Any, model: Model, facts: list[Fact]) -> dict[str, Tensor]:
    """Batches of one or two facts, so that there is something to share."""
    if isinstance(localizer, LookupProbe):  # it needs answers that facts share
        facts = letters()
    values = localizer.run(model, facts, facts[:2], batch_tokens=24).values
    return {"neurons": values} if isinstance(values, Tensor) else dict(values)


def test_several_processes_score_what_one_scores(tmp_path: Path) -> None:
    model, facts = tiny_model("llama"), tiny_facts()

    def work() -> int:
        with joined() as ranks, together(ranks):
            for name, localizer in localizers().items():
                found = {key: t.contiguous() for key, t in scored(localizer, model, facts).items()}
                save_file(found, tmp_path / f"{name}-{ranks.rank}.safetensors")
        return 0

    children = job(work, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    for name, localizer in localizers().items():
        alone = scored(localizer, model, facts)
        assert ("neurons" in alone) == (name not in BY_WEIGHT)
        for rank in range(2):
            shared = load_file(tmp_path / f"{name}-{rank}.safetensors")
            assert set(shared) == set(alone), name
            for key, values in alone.items():
                if name in BY_WEIGHT:
                    torch.testing.assert_close(shared[key], values, rtol=1e-3, atol=1e-5, msg=name)
                else:
                    assert torch.equal(shared[key], values), name


def _own_token(model: Model, facts: list[Fact]) -> int:
    """A token of the second fact that no other has."""
    ids = [set(model.tokenizer(fact.prompt + fact.target).input_ids) for fact in facts]
    return int(min(ids[1] - ids[0] - ids[2]))


@pytest.mark.parametrize("name", ["saliency", "activation-norm", "imprint", "direct-logit"])
def test_what_is_no_number_names_the_layer_and_the_fact(name: str) -> None:
    """Layer 1 gives infinity wherever a token of the second fact stands."""
    model, facts = tiny_model("llama"), tiny_facts()
    own, seen = _own_token(model, facts), {}

    def note(ids: Tensor) -> None:
        seen["ids"] = ids

    def spoil(state: Tensor) -> Tensor:
        return torch.where((seen["ids"] == own)[..., None], torch.inf, state)

    with (
        patched(model.module, {model.atlas.blocks[1]: spoil}, {model.atlas.embed: note}),
        pytest.raises(
            InputError, match=r"fact 'capital': layer 1 of tiny-llama gives NaN or infinity: damaged"
        ),
    ):
        LOCALIZERS[name]().run(model, facts, batch_tokens=24)


@pytest.mark.parametrize("name", ["depn", "knowledge-neurons", "zero-out", "traced-neurons"])
def test_so_do_methods_that_run_the_blocks_one_by_one(name: str) -> None:
    model, facts = tiny_model("llama"), tiny_facts()
    model.module.get_submodule(model.atlas.embed).weight.data[_own_token(model, facts)] = torch.nan
    with pytest.raises(InputError, match=r"fact 'capital': .* gives NaN or infinity"):
        (QUICK.get(name) or LOCALIZERS[name]()).run(model, facts, batch_tokens=24)


def test_gradients_that_are_no_numbers_are_told_from_layers_that_are_none(monkeypatch: Any) -> None:
    model, facts = tiny_model("llama"), tiny_facts()
    honest = GradientSaliency._of_batch

    def broken(self: GradientSaliency, model: Any, batch: Any) -> Any:
        (grid,) = honest(self, model, batch)
        return (grid / 0 if 2 in batch.examples else grid,)

    monkeypatch.setattr(GradientSaliency, "_of_batch", broken)
    with pytest.raises(
        InputError, match="fact 'tongue': its saliency comes out as NaN or infinity, though every"
    ):
        GradientSaliency().run(model, facts, batch_tokens=1)


def test_a_process_says_what_is_wrong_with_an_item_and_the_others_end(tmp_path: Path) -> None:
    model, facts = tiny_model("llama"), tiny_facts()
    model.module.get_submodule(model.atlas.embed).weight.data[:] = float("nan")

    def work() -> int:
        try:
            with joined() as ranks, together(ranks):
                GradientSaliency().run(model, facts, batch_tokens=1)
        except InputError as error:
            print(json.dumps(str(error)))
        except Exception as error:
            print(json.dumps(type(error).__name__))
        return 0

    children = job(work, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0]
    said = sorted(json.loads(child.said) for child in children)
    assert said[0] == "AlreadySaid" and "the embedding of tiny-llama gives NaN or infinity" in said[1]
