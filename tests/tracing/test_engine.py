"""The engine checks its replays against whole forwards, where they can differ, and falls back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tracing.replay.replay_engine as replay_engine
from locus.errors import InputError
from locus.fact import Fact
from locus.model import Model
from tests.tiny import tiny_facts, tiny_model
from tracing import CausalTrace, ZeroOut
from tracing.localizers.knowledge_neurons import KnowledgeNeurons
from tracing.replay.blocks import Blocks

SHORT = Fact(id="a", prompt="city of Rome", target=" Italy", subject="Rome")
LONG = Fact(id="b", prompt="The Eiffel Tower is in the city of", target=" Paris", subject="Eiffel Tower")


def settings(**more: Any) -> dict[str, Any]:
    return {"kinds": ("block", "mlp"), "samples": 2, "window": 2, "metric": "logprob", **more}


def test_a_window_that_only_the_longer_fact_reaches_is_seen() -> None:
    """GPT-Neo's blocks slice a mask of their own by the number of keys: right for one row, wrong for packed ones."""
    model = tiny_model("gptneo")
    plain = CausalTrace(**settings(engine="plain")).run(model, [SHORT, LONG])
    with pytest.warns(UserWarning, match="whole forwards"):
        found = CausalTrace(**settings()).run(model, [SHORT, LONG])
    assert all(fact.engine.startswith("plain (") for fact in found)
    for one, other in zip(found, plain, strict=True):
        for kind in one.kinds:
            torch.testing.assert_close(one.scores[kind], other.scores[kind], atol=1e-5, rtol=0)


def test_a_longer_question_later_is_checked_again() -> None:
    """Batches of one fact each: the short one's answers are right, the long one's would not be."""
    model = tiny_model("gptneo")
    whole = ZeroOut(candidates=0.2, engine="plain").run(model, [SHORT, LONG])
    with pytest.warns(UserWarning, match="whole forwards"):
        found = ZeroOut(candidates=0.2).run(model, [SHORT, LONG])
    torch.testing.assert_close(found.values, whole.values, atol=1e-5, rtol=1e-4)


def test_a_replay_that_gives_nan_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    real = replay_engine.answer_together

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        answers = real(*args, **kwargs)
        for one in answers:
            one.cells[:] = float("nan")
        return answers

    monkeypatch.setattr(replay_engine, "answer_together", spoiled)
    with pytest.warns(UserWarning, match="differ from whole ones by inf"):
        found = CausalTrace(**settings()).run(model, [LONG])
    assert found.facts[0].engine.startswith("plain (")


def _fail(*_: Any, **__: Any) -> None:
    raise ValueError("Attention mask should be of size (2, 1, 3, 7)")


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose blocks refuse masks of ours, as XGLM's do."""
    monkeypatch.setattr(Blocks, "__call__", _fail)
    monkeypatch.setattr(Blocks, "with_keys", _fail)
    return tiny_model("llama")


def test_a_block_that_fails_is_a_reason_to_fall_back(picky: Model) -> None:
    with pytest.warns(UserWarning, match="ValueError: Attention mask should be of size"):
        found = CausalTrace(**settings()).run(picky, [LONG])
    assert found.facts[0].engine.startswith("plain (")
    with pytest.raises(InputError, match="cannot be replayed"):
        CausalTrace(**settings(engine="replay")).run(picky, [LONG])


def test_integrated_gradients_fall_back_too(picky: Model) -> None:
    facts = tiny_facts()[:1]
    with pytest.warns(UserWarning, match="whole forwards"):
        found = KnowledgeNeurons(steps=2).run(picky, facts)
    assert torch.equal(found.values, KnowledgeNeurons(steps=2, engine="plain").run(picky, facts).values)


def test_packed_rows_behind_the_context_fall_back() -> None:
    """A prompt near the end of the context: the buffer of GPT-Neo's blocks is too short for packed rows."""
    model = tiny_model("gptneo", max_position_embeddings=12)
    with pytest.warns(UserWarning, match="whole forwards"):
        found = CausalTrace(**settings()).run(model, [LONG])
    assert found.facts[0].engine.startswith("plain (")
