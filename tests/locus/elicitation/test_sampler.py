"""Sampling that reads a common beginning once equals sampling that reads everything anew."""

from __future__ import annotations

import pytest
import torch

from locus.elicitation.sampler import Sampling, continuations, prompt_ids
from locus.errors import InputError
from locus.model import Model
from tests.tiny import tiny_model

PROMPTS = (
    "The capital of Germany is",
    "The capital of Rome",
    "The capital and the largest city of Germany is",
)
GREEDY = Sampling(top_p=1e-9)


def _greedy(model: Model, ids: list[int], n_new: int) -> tuple[int, ...]:
    """The obvious way: no cache, no batch."""
    special, out = set(model.tokenizer.all_special_ids), list(ids)
    for _ in range(n_new):
        token = int(model.module(input_ids=torch.tensor([out]), use_cache=False).logits[0, -1].argmax())
        if token in special:
            break
        out.append(token)
    return tuple(out[len(ids) :])


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2", "neox", "opt", "falcon", "gemma2"])
@pytest.mark.parametrize("max_rows", [1, 2, 64])
def test_a_nucleus_of_one_token_is_greedy_decoding(arch: str, max_rows: int) -> None:
    """Rows of unequal length, with and without others beside them, on every kind of position scheme."""
    model = tiny_model(arch)
    prompts = [prompt_ids(model, text) for text in PROMPTS]
    found = continuations(model, prompts, 2, 9, GREEDY, max_rows=max_rows)
    wanted = [_greedy(model, ids, 9) for ids in prompts]
    assert found == [[one, one] for one in wanted]


def test_draws_depend_on_the_seed_and_the_prompt_alone() -> None:
    model = tiny_model()
    prompts = [prompt_ids(model, text) for text in PROMPTS]
    every = continuations(model, prompts, 4, 6, Sampling(seed=3))
    alone = [continuations(model, [ids], 4, 6, Sampling(seed=3), max_rows=3)[0] for ids in prompts]
    assert every == alone
    assert every != continuations(model, prompts, 4, 6, Sampling(seed=4))
    assert len(set(every[0])) > 1


def test_draws_follow_the_distribution() -> None:
    """Frequencies of the first token over 2,000 draws, against the softmax at that temperature."""
    model = tiny_model()
    ids = prompt_ids(model, PROMPTS[0])
    found = continuations(model, [ids], 2000, 1, Sampling(temperature=0.7, top_p=1.0), max_rows=2000)[0]
    logits = model.module(input_ids=torch.tensor([ids])).logits[0, -1].detach() / 0.7
    probs = logits.softmax(-1)
    counts = torch.bincount(torch.tensor([one[0] for one in found if one]), minlength=len(probs)) / 2000
    spoken = torch.ones(len(probs), dtype=torch.bool)
    spoken[model.tokenizer.all_special_ids] = False
    assert float((counts - probs)[spoken].abs().max()) < 0.04


def test_a_continuation_ends_where_it_is_told() -> None:
    model = tiny_model()
    ids = prompt_ids(model, PROMPTS[0])
    whole = continuations(model, [ids], 3, 24, Sampling())[0]
    ended = continuations(model, [ids], 3, 24, Sampling(), ends=lambda text: True)[0]
    assert ended == [one[:8] for one in whole]
    assert max(map(len, whole)) > 8


def test_what_cannot_be_continued_is_told() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="room"):
        continuations(model, [[1] * 250], 1, 10, GREEDY)
    with pytest.raises(InputError, match="nothing to continue"):
        continuations(model, [[]], 1, 10, GREEDY)
    with pytest.raises(InputError, match="temperature"):
        Sampling(temperature=0.0)
    with pytest.raises(InputError, match="top_p"):
        Sampling(top_p=0.0)
    assert continuations(model, [], 1, 10, GREEDY) == []
