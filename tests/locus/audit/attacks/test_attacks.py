"""The parts of an audit one by one, each against a slow version of itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from locus.audit.attacks.lens import look_inside
from locus.audit.attacks.relearn import halves, relearn
from locus.audit.attacks.rounding import rounded_weights, survive_rounding
from locus.audit.neutral_text import read_text
from locus.audit.questions import ask, questions_of
from locus.audit.run import ask_about
from locus.audit.settings import RelearnAttack
from locus.audit.state import State
from locus.delta import WeightDelta
from locus.metrics import round_to_nearest
from locus.tokens import encode_text
from tests.locus.audit.audit_model import TEXT, facts, knowing, never_knew, noisy
from tests.tiny import tiny_facts, tiny_model


def _bits(model: object) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.module.named_parameters()}  # type: ignore[attr-defined]


def test_kl_and_nll_equal_whole_forwards_of_two_models_whatever_memory_there_is() -> None:
    base, edited = knowing(), noisy(knowing(), 0.1)
    delta = WeightDelta.between(base, edited)
    encoded = [piece for line in TEXT for piece in encode_text(base, line)]
    states = [State("base", "base", base), State("edit", "edit", base, delta)]
    roomy = read_text(states, encoded)["edit"]
    tight = read_text(states, encoded, max_tokens=30, max_bytes=40 * 4 * base.atlas.d_vocab)["edit"]
    order = sorted(range(len(roomy.paragraphs)), key=lambda i: roomy.paragraphs[i])
    again = sorted(range(len(tight.paragraphs)), key=lambda i: tight.paragraphs[i])
    torch.testing.assert_close(roomy.kl[order], tight.kl[again], atol=1e-5, rtol=1e-4)
    kl, nll = 0.0, 0.0
    for one in encoded:
        ids = torch.tensor([one.ids])
        with torch.no_grad():
            p = base.module(ids).logits[0, one.target_start - 1 : -1].log_softmax(-1)
            q = edited.module(ids).logits[0, one.target_start - 1 : -1].log_softmax(-1)
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        nll -= q.gather(1, ids[0, one.target_start :, None]).sum().item()
    assert roomy.kl.sum().item() == torch.tensor(kl).item() or abs(roomy.kl.sum().item() - kl) < 1e-3 * abs(
        kl
    )
    assert abs(roomy.nll.sum().item() - nll) < 1e-3 * nll


def test_a_state_is_active_only_inside() -> None:
    base = knowing()
    before = _bits(base)
    state = State("edit", "edit", base, WeightDelta.between(base, noisy(base, 0.1)))
    with state.active() as model:
        assert not torch.equal(
            model.module.get_parameter(base.atlas.embed + ".weight"), before[base.atlas.embed + ".weight"]
        )
    assert all(torch.equal(p, before[name]) for name, p in base.module.named_parameters())


def test_the_lens_leak_counts_both_ends() -> None:
    model = knowing()
    forget, _ = facts()
    leak = look_inside(model, questions_of(model, [(f.id, f) for f in forget]))
    d_vocab = model.atlas.d_vocab
    assert leak.anywhere(1).values.tolist() == [1.0] * 8, "the last layer answers right"
    assert torch.equal(leak.top(4), leak.rank < 4) and torch.equal(leak.bottom(4), leak.bottom_rank < 4)
    assert leak.anywhere(d_vocab, "bottom").values.tolist() == [1.0] * 8
    assert (leak.rank + leak.bottom_rank < d_vocab).all()


def test_relearning_teaches_one_half_tests_the_other_and_leaves_no_trace() -> None:
    model = never_knew()
    before = _bits(model)
    forget, _ = facts()
    questions = ask_about(model, forget)["forget"]
    for attack in (RelearnAttack(at=(1, 6), lr=1e-2), RelearnAttack("lora", at=(1, 6), lr=5e-2)):
        curve = relearn(model, questions, attack)
        assert curve.steps == (0, 1, 6)
        assert set(curve.taught).isdisjoint(curve.tested)
        assert {*curve.taught, *curve.tested} == {f.id for f in forget}
        assert curve.taught_prob[-1].mean() > curve.taught_prob[0].mean() + 0.05, attack.method
        start = ask(model, questions).prob.values
        at = {fact: i for i, fact in enumerate(questions.facts)}
        torch.testing.assert_close(curve.tested_prob[0], start[[at[f] for f in curve.tested]])
        for name, p in model.module.named_parameters():
            assert torch.equal(p, before[name]) and not p.requires_grad and p.grad is None, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attacker_on_a_half_precision_model_trains_as_well_as_on_float32(dtype: torch.dtype) -> None:
    """At this learning rate a step is less than half a unit in the last place of most half-precision weights."""
    full, half = noisy(never_knew(), 0.0), noisy(never_knew(), 0.0)
    half.module.to(dtype)
    before = _bits(half)
    questions = ask_about(full, facts()[0])["forget"]
    attack = RelearnAttack(at=(24,), lr=2e-4)
    curves = [relearn(model, questions, attack) for model in (full, half)]
    gained = [float(c.taught_nll[0].mean() - c.taught_nll[-1].mean()) for c in curves]
    assert gained[0] > 0.5 and gained[1] > 0.8 * gained[0]
    assert all(torch.equal(p, before[name]) for name, p in half.module.named_parameters())


def test_a_relearning_that_dies_leaves_no_trace_either() -> None:
    model = never_knew()
    before = _bits(model)
    questions = ask_about(model, facts()[0])["forget"]

    class Interrupted(Exception):
        pass

    def fail(*_: object) -> None:
        raise Interrupted

    handle = model.module.get_submodule(model.atlas.unembed).register_full_backward_pre_hook(fail)
    try:
        relearn(model, questions, RelearnAttack(at=(1,)))
    except Interrupted:
        pass
    else:
        raise AssertionError("the hook did not run")
    finally:
        handle.remove()
    assert all(
        torch.equal(p, before[name]) and not p.requires_grad for name, p in model.module.named_parameters()
    )


def test_halves_are_seeded_disjoint_and_as_equal_as_can_be() -> None:
    names = [str(i) for i in range(7)]
    taught, tested = halves(names, 0)
    assert len(taught) == 3 and sorted(taught + tested) == list(range(7))
    assert halves(names, 0) == (taught, tested)
    assert any(halves(names, seed) != (taught, tested) for seed in range(1, 5))


def test_rounding_changes_the_blocks_matrices_only_and_is_undone() -> None:
    for arch in ("llama", "gpt2"):
        model = tiny_model(arch)
        before = _bits(model)
        with rounded_weights(model, "int4"):
            changed = {n for n, p in model.module.named_parameters() if not torch.equal(p, before[n])}
            blocks = tuple(f"{block}." for block in model.atlas.blocks)
            assert changed == {n for n, p in before.items() if p.dim() == 2 and n.startswith(blocks)}
        assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())


def test_gpt2s_transposed_matrices_are_rounded_by_output() -> None:
    model = tiny_model("gpt2")
    name = f"{model.atlas.neuron_in[0]}.weight"
    old = model.module.get_parameter(name).clone()
    with rounded_weights(model, "int8"):
        torch.testing.assert_close(model.module.get_parameter(name).data, round_to_nearest(old.T, 8).T)


def test_bfloat16_is_torchs_own_cast_and_every_format_answers() -> None:
    model = tiny_model("llama")
    questions = questions_of(model, [(f.id, f) for f in tiny_facts()])
    before = _bits(model)
    with rounded_weights(model, "bfloat16"):
        for name, p in model.module.named_parameters():
            assert torch.equal(p, before[name].bfloat16().float())
    results = survive_rounding(model, questions, questions)
    assert [r.format for r in results] == ["bfloat16", "int8", "int4"]
    plain = ask(model, questions).nll
    errors = [(r.forget.nll - plain).abs().mean().item() for r in results]
    assert 0 < errors[0] < errors[2] and errors[1] < errors[2]
