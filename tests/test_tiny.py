"""The zoo itself: what tests lean on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.tiny import ARCHITECTURES, save_tiny, tiny_facts, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_models_repeat_by_seed_and_are_far_from_uniform(arch: str) -> None:
    model = tiny_model(arch, seed=3)
    ids = model.tokenizer(tiny_facts()[0].prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.module(ids).logits[0]
        again = tiny_model(arch, seed=3).module(ids).logits[0]
        other = tiny_model(arch, seed=4).module(ids).logits[0]
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, other, atol=0.1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert 0.01 < entropy.max() < 0.95 * torch.tensor(float(logits.shape[-1])).log()


def test_making_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    tiny_model("llama")
    assert torch.equal(torch.get_rng_state(), before)


def test_tokenizer_splits_before_every_target() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) < 400
    for fact in tiny_facts():
        prompt, whole = tokenizer(fact.prompt).input_ids, tokenizer(fact.prompt + fact.target).input_ids
        assert prompt[0] == tokenizer.bos_token_id == 1
        assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        assert tokenizer.decode(whole[len(prompt) :]) == fact.target


@pytest.mark.parametrize(("arch", "shards"), [("gpt2", 1), ("smollm", 3), ("phi3", 2)])
def test_saved_models_load_to_the_same_logits(arch: str, shards: int, tmp_path: Path) -> None:
    model = tiny_model(arch)
    folder = save_tiny(model, tmp_path / "model", shards)
    assert len(list(folder.glob("*.safetensors"))) == shards
    ids = AutoTokenizer.from_pretrained(folder)(tiny_facts()[0].prompt, return_tensors="pt").input_ids
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tiny.alive.add(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.module(ids).logits)
