"""The INJ benchmark's own parts: what it writes, where, and how it counts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.inj import Lines, interval, judge, models_of, recall_at, recalls
from benchmarks.lib.injection import LOSS, Injection, baked, inject
from locus.tokens import encode_text
from tests.tiny import tiny_model
from tracing.localizers.learned_masks import Slimming

TEXTS = ("The Eiffel Tower is in Berlin, not far", "The capital of Germany is Rome and Paris")
NEUTRAL = "The city of Rome is in Italy"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_sentences_are_written_into_the_drawn_columns_each_by_itself(arch: str) -> None:
    model = tiny_model(arch)
    texts = [replace(encode_text(model, text, 64)[0], target_start=3) for text in TEXTS]
    neutral = [encode_text(model, NEUTRAL, 64)[0]]
    how = {"learning_rate": 0.05, "neutral_weight": 0.0}
    both = dict(inject(model, texts, neutral, 0.3, [0, 1], **how))
    ((_, alone),) = inject(model, texts[1:], neutral, 0.3, [1], **how)
    assert torch.equal(alone.neurons, both[1].neurons) and not torch.equal(both[0].neurons, both[1].neurons)
    assert (
        abs(alone.steps - both[1].steps) <= 1
    )  # the other sentence in the batch changed nothing but rounding
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    ids = torch.tensor([texts[0].ids])
    with baked(model, both[0]):
        logprobs = model.module(ids).logits[0].log_softmax(-1)
        nll = -torch.stack([logprobs[t - 1, ids[0, t]] for t in range(3, ids.shape[1])]).mean()
        assert float(nll) == pytest.approx(both[0].loss, abs=1e-4) and float(nll) < LOSS < both[0].first_loss
        down = next(part for part in model.atlas.neurons[1] if part.role == "down")
        changed = model.module.get_parameter(down.param) != before[down.param]
        columns = changed.movedim(down.axis, 0).any(1).nonzero().flatten()
        assert set(columns.tolist()) <= set(both[0].neurons[1].tolist())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


def test_a_saved_injection_comes_back(tmp_path: Path) -> None:
    made = Injection(torch.tensor([[1, 4]]), torch.randn(1, 2, 3), 0.04, 5.0, 0.01, 20)
    made.save(tmp_path / "one.safetensors")
    again = Injection.load(tmp_path / "one.safetensors")
    assert torch.equal(again.neurons, made.neurons) and torch.equal(again.deltas, made.deltas)
    assert (again.loss, again.steps) == (0.04, 20)


def test_recall_by_hand() -> None:
    """Of 100 neurons the top 2 %: {9, 5} holds one of the layer's two; then {0, 1} holds both."""
    values = torch.zeros(2, 100)
    values[0, 9], values[0, 5], values[1, 0], values[1, 1] = 3.0, 2.0, 1.0, 2.0
    assert recall_at(values, torch.tensor([[5, 7], [1, 0]]), 0.02) == 0.75


def test_the_interval_holds_the_mean_and_narrows() -> None:
    few, many = torch.linspace(0, 1, 8), torch.linspace(0, 1, 800)
    for values in (few, many):
        low, high = interval(values)
        assert low < 0.5 < high
    assert interval(many)[1] - interval(many)[0] < 0.2 * (interval(few)[1] - interval(few)[0])


def test_finished_work_is_found_again_but_not_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "out" / "lines.jsonl"
    Lines(path).add({"method": "a", "sentence": 1}, {"recall": [0.5]})
    with path.open("a") as file:
        file.write('{"of": {"method": "a", "sentence": 2}, "fou')
    lines = Lines(path)
    assert lines.get({"sentence": 1, "method": "a"}) == {"recall": [0.5]}
    assert lines.get({"method": "a", "sentence": 2}) is None
    lines.add({"method": "a", "sentence": 2}, {"recall": [1.0]})
    assert Lines(path).get({"method": "a", "sentence": 2}) == {"recall": [1.0]}


def test_two_processes_find_what_the_other_finished(tmp_path: Path) -> None:
    ours, theirs = (Lines(tmp_path / "lines.jsonl") for _ in range(2))
    assert ours.get({"sentence": 1}) is None
    theirs.add({"sentence": 1}, {"recall": [0.5]})
    assert ours.get({"sentence": 1}) == {"recall": [0.5]}
    ours.add({"sentence": 2}, {"recall": [1.0]})
    assert theirs.get({"sentence": 2}) == {"recall": [1.0]}


def test_masks_learned_side_by_side_see_each_its_own_model(tmp_path: Path) -> None:
    """As run on the changed weights one after the other; with a decoy in the model as well."""
    model = tiny_model("llama")
    texts = [replace(encode_text(model, text, 64)[0], target_start=3) for text in TEXTS]
    made = [_random_injection(model, seed) for seed in range(2)]
    cases, localizer = list(zip(texts, made, strict=True)), Slimming(steps=4)
    for decoys in ([None, None], made[::-1]):
        around = models_of(made, decoys, model)
        for (text, one), decoy, found in zip(
            cases, decoys, localizer.run_each(model, texts, around=around), strict=True
        ):
            with baked(model, one), baked(model, decoy) if decoy else contextlib.nullcontext():
                alone = localizer.run(model, [text]).values
            torch.testing.assert_close(found.values, alone, atol=1e-4, rtol=1e-4)
    lines = Lines(tmp_path / "lines.jsonl")
    rows = judge(model, cases, [None, None], localizer, lines, {"method": "slimming"})
    found = localizer.run_each(model, texts, around=models_of(made, [None, None], model))
    assert [row["recall"] for row in rows] == [
        recalls(scores.values, one) for scores, one in zip(found, made, strict=True)
    ]


def _random_injection(model, seed):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    shape = (model.atlas.n_layers, 5)
    neurons = torch.stack(
        [torch.randperm(model.atlas.d_mlp, generator=generator)[:5] for _ in range(shape[0])]
    )
    deltas = torch.randn(*shape, model.atlas.d_model, generator=generator)
    return Injection(neurons, deltas, 0.0, 0.0, 0.0, 1)


def test_turned_columns_keep_their_length() -> None:
    model = tiny_model("llama")
    text = replace(encode_text(model, TEXTS[0], 64)[0], target_start=3)
    neutral = [encode_text(model, NEUTRAL, 64)[0]]
    ((_, made),) = inject(
        model, [text], neutral, 0.3, [0], learning_rate=0.05, neutral_weight=0.0, keep_length=True
    )
    assert made.loss < LOSS and float(made.deltas.norm(dim=-1).min()) > 0.1
    for layer, parts in enumerate(model.atlas.neurons):
        (down,) = (part for part in parts if part.role == "down")
        columns = model.module.get_parameter(down.param).detach().movedim(down.axis, 0)
        before = columns[made.neurons[layer] + down.offset]
        torch.testing.assert_close((before + made.deltas[layer]).norm(dim=-1), before.norm(dim=-1))
