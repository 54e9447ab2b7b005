"""Where an answer becomes readable at the subject's last token."""

from __future__ import annotations

import pytest
import torch

from locus.errors import InputError
from locus.fact import Example, Fact
from locus.hooks import record
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.localizers.lookup_probe import LookupProbe, decodability, subject_states

LETTERS = "ABCDEFGHIJKLMNOP"
SIGNS = [(1 if i & 1 else -1, 1 if i & 2 else -1) for i in range(len(LETTERS))]


def letters() -> list[Fact]:
    """Sixteen subjects with two traits each; the answer is whether the two are alike."""
    return [
        Fact(
            id=letter,
            prompt=f"{letter} is in",
            target=" Paris" if a == b else " Rome",
            subject=letter,
            relation="city",
        )
        for letter, (a, b) in zip(LETTERS, SIGNS, strict=True)
    ]


@torch.no_grad()
def _planted(layer: int):  # type: ignore[no-untyped-def]
    """A model in which one neuron of one layer multiplies the two traits; nothing else writes anything.

    Its gate reads the first trait and its up row the second, so it says b where a is 1 and next to nothing where a is
    -1: with b itself, which the stream holds, a line tells a = b from a != b. Without it no line does.
    """
    model = tiny_model("llama")
    parameters = dict(model.module.named_parameters())
    for name, parameter in parameters.items():
        if "o_proj" in name or "down_proj" in name:
            parameter.zero_()
        if "norm" in name:
            parameter.fill_(1)
    mlp = f"model.layers.{layer}.mlp"
    for projection, entry in (("gate_proj", 0), ("up_proj", 1)):
        parameters[f"{mlp}.{projection}.weight"][5].zero_()
        parameters[f"{mlp}.{projection}.weight"][5, entry] = 1
    parameters[f"{mlp}.down_proj.weight"][2, 5] = 0.2
    for fact, (a, b) in zip(letters(), SIGNS, strict=True):
        encoded = encode(model, fact)
        assert encoded.subject is not None
        row = parameters["model.embed_tokens.weight"][encoded.ids[encoded.subject[1] - 1]]
        row.zero_()
        row[0], row[1] = a, b
    return model


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_planted_lookup_is_found_at_its_layer_and_no_other(layer: int) -> None:
    model, probe = _planted(layer), LookupProbe(ridge=1e-4)
    curve = probe.curve(model, letters())
    assert (curve.before[: layer + 1] <= 0).all() and (curve.behind[:layer] <= 0).all()
    assert (curve.behind[layer:] > 0.95).all() and (curve.before[layer + 1 :] > 0.95).all()
    chosen = probe.run(model, letters()).choose(model.atlas.d_mlp)
    assert chosen[layer].all() and int(chosen.sum()) == model.atlas.d_mlp


def test_leaving_out_equals_refitting_without_each_subject() -> None:
    """The slow way: for each subject a ridge regression on the others, the intercept not penalized."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(14, 5, generator=generator)
    answers = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0])
    subjects = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 3])
    states[:, 0] += 2 * (answers == 1)
    x = states.double() / states.double().square().mean(1, keepdim=True).sqrt()
    penalty = 0.3 * (x - x.mean(0)).square().sum() / len(x)
    y = torch.eye(3, dtype=torch.float64)[answers]
    design = torch.cat([x, torch.ones(14, 1, dtype=x.dtype)], 1)
    shrink = penalty * torch.diag(torch.tensor([1.0] * 5 + [0.0], dtype=x.dtype))
    error = null = 0.0
    for subject in subjects.unique():
        held, rest = subjects == subject, subjects != subject
        weights = torch.linalg.solve(design[rest].T @ design[rest] + shrink, design[rest].T @ y[rest])
        error += float((y[held] - design[held] @ weights).square().sum())
        null += float((y[held] - y[rest].mean(0)).square().sum())
    assert decodability(states, answers, subjects, 0.3) == pytest.approx(1 - error / null, abs=1e-9)
    assert 1 - error / null > 0.2


def test_a_subject_asked_twice_does_not_give_its_answer_away() -> None:
    """Random states and answers, each subject twice: with single facts left out the other copy would tell."""
    states = torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    answers = torch.randint(2, (20,), generator=torch.Generator().manual_seed(1)).repeat(2)
    assert decodability(states, answers, torch.arange(20).repeat(2), 0.01) < 0.3
    assert decodability(states, answers, torch.arange(40), 0.01) > 0.9


@pytest.mark.parametrize("arch", ["llama", "gpt2", "neox", "gemma2", "opt"])
def test_states_are_those_of_a_plain_forward_of_each_fact(arch: str) -> None:
    """In a batch of unequal lengths, against the fact alone; and the MLP's share is what its block added."""
    model, facts = tiny_model(arch), tiny_facts()
    without, whole = subject_states(model, facts, 4096)
    for i, fact in enumerate(facts):
        encoded = encode(model, fact)
        assert encoded.subject is not None
        at, atlas = encoded.subject[1] - 1, model.atlas
        with (
            torch.no_grad(),
            record(model.module, outputs=[*atlas.blocks, *atlas.attn_out], inputs=atlas.blocks) as seen,
        ):
            model.module(torch.tensor([encoded.prompt_ids]))
        for layer, block in enumerate(atlas.blocks):
            read = seen.inputs[block][0, at] + seen.outputs[atlas.attn_out[layer]][0, at]
            torch.testing.assert_close(whole[i, layer], seen.outputs[block][0, at], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(without[i, layer], read, atol=1e-4, rtol=1e-4)


def test_a_retain_set_of_the_relation_counts_and_too_few_facts_are_refused() -> None:
    model = tiny_model("llama")
    facts = letters()
    some, rest = facts[:4], facts[4:]
    with pytest.raises(InputError, match="'Paris' 2, 'Rome' 2") as refused:
        LookupProbe().run(model, some)
    assert "\n" not in str(refused.value)
    whole, split = LookupProbe().curve(model, facts), LookupProbe().curve(model, some, rest)
    torch.testing.assert_close(whole.behind, split.behind)
    with pytest.raises(InputError, match="no subject"):
        LookupProbe().run(model, [Fact(id=f.id, prompt=f.prompt, target=f.target) for f in facts])
    with pytest.raises(InputError, match="not bare prompts"):
        LookupProbe().run(model, [Example("Rome is", " old")])
    with pytest.raises(InputError, match="no facts"):
        LookupProbe().run(model, [])
