"""Further attacks on a model that knows and on one that never did, each against a slow or closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from locus.audit import AuditSettings, RelearnAttack
from locus.audit.attacks import (
    choice,
    depth,
    familiarity,
    generation,
    probe,
    prompts,
    relearn_lora,
    soft_prompt,
    strength,
)
from locus.audit.attacks.table import ATTACKS, FIGURES_OF, NAMES, attack_all, attacks_of
from locus.audit.context import Context
from locus.audit.figure_values import FigureValues
from locus.audit.metric_table import FIGURES
from locus.audit.questions import ask, questions_of
from locus.audit.run import ask_about
from locus.audit.state import State
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.tokens import encode
from tests.locus.audit.audit_model import facts, knowing, never_knew
from tests.tiny import tiny_facts, tiny_model


def context(**changes: object) -> Context:
    forget, retain = facts()
    forget = [
        replace(f, alternatives=tuple(c for c in (" Rome", " Paris", " Berlin") if c != f.target))
        for f in forget
    ]
    base = State("base", "base", knowing())
    return replace(
        Context(base, forget, retain, ask_about(knowing(), forget, retain), max_new_tokens=4), **changes
    )


def knows() -> State:
    return State("knowing", "edit", knowing())


def ignorant() -> State:
    return State("never knew", "edit", never_knew())


def test_generation_stops_at_every_end_token_of_the_generation_config() -> None:
    """An instructed checkpoint ends its turn with a token that only generation_config.json names."""
    model = knowing()
    prompt = encode(model, facts()[0][0].example).prompt_ids
    whole = generation.generate(model, [prompt], 6)[0]
    second = model.tokenizer(whole, add_special_tokens=False)["input_ids"][1]
    before = model.module.generation_config.eos_token_id
    try:
        model.module.generation_config.eos_token_id = [2, second]
        assert generation.end_tokens(model)[-1] == second
        short = generation.generate(model, [prompt], 6)[0]
    finally:
        model.module.generation_config.eos_token_id = before
    assert len(model.tokenizer(short, add_special_tokens=False)["input_ids"]) <= 2 and whole.startswith(short)
    assert len(short) < len(whole)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma2", "neox", "falcon", "phi"])
@pytest.mark.parametrize("padded", [True, False])
def test_generation_equals_a_greedy_loop_without_cache_or_batches(
    arch: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(arch, seed=3)
    encoded = ask_about(model, tiny_facts())["forget"].encoded
    assert len({len(e.prompt_ids) for e in encoded}) > 1
    if not padded:
        monkeypatch.setattr(generation, "_padding_is_harmless", lambda *_: False)
    written = generation.generate(model, [e.prompt_ids for e in encoded], 5)
    for one, text in zip(encoded, written, strict=True):
        ids = list(one.prompt_ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
        assert text == model.tokenizer.decode(ids[len(one.prompt_ids) :], skip_special_tokens=True)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(InputError, match="leaves no room"):
        generation.generate(knowing(), [[1] * 250], 10)


def test_greedy_flags_are_the_argmax_of_whole_forwards() -> None:
    model = tiny_model("gpt2")
    encoded = ask_about(model, tiny_facts())["forget"].encoded
    for one, flags in zip(encoded, generation.greedy_flags(model, encoded, 30), strict=True):
        with torch.no_grad():
            best = model.module(torch.tensor([one.ids])).logits[0].argmax(-1)
        expected = [int(best[i - 1]) == one.ids[i] for i in range(one.target_start, len(one.ids))]
        assert flags.tolist() == expected


def test_what_is_known_is_memorized_extracted_and_mentioned_and_what_is_not_is_not() -> None:
    known = (generation.run(knows(), context()) | familiarity.run(knows(), context())).items
    for key in ("generation.exact", "generation.extraction", "generation.rouge", "familiarity.completion"):
        assert known[key].values.mean() > 0.9, key
    unknown = (generation.run(ignorant(), context()) | familiarity.run(ignorant(), context())).items
    assert unknown["generation.exact"].values.mean() < 0.5
    assert unknown["familiarity.completion"].values.mean() < 0.5


def test_multiple_choice_is_likelihood_and_letters_are_where_the_text_puts_them() -> None:
    fact = context().facts[0]
    text, right, n = choice.letter_question(fact, seed=0)
    assert n == 1 + len(fact.alternatives)
    assert f"{choice.OPTION_LETTERS[right]}. {fact.target.strip()}\n" in text and text.endswith("Answer:")
    assert {choice.letter_question(fact, seed)[1] for seed in range(12)} == set(range(n))
    found = choice.run(knows(), context()).items
    assert found["choice.cloze"].values.tolist() == [1.0] * 8
    assert (found["familiarity.probability"].values > 0.9).all()
    assert choice.run(ignorant(), context()).items["familiarity.probability"].values.mean() < 0.7
    assert choice.run(knows(), context(facts=facts()[0])) == FigureValues(), (
        "without alternatives nothing is measured"
    )


def test_other_prompts_show_facts_and_never_the_answer() -> None:
    given = context()
    (shots,) = prompts.few_shot(given.facts, given.retain, seed=0)
    shown = [f for f in given.retain if f.prompt in shots[0].prompt]
    assert len(shown) == prompts.N_SHOTS and not any(f.held_out for f in shown)
    assert all(
        s.prompt.endswith(f.prompt) and f.prompt + f.target not in s.prompt
        for s, f in zip(shots, given.facts, strict=True)
    )
    assert prompts.few_shot(given.facts, given.retain[:2], seed=0) == []
    found = prompts.run(knows(), given).items
    assert set(found) == set(FIGURES_OF["prompts"])
    assert found["prompts.any.top1"].values.mean() >= 0.5
    single = prompts._asked(
        knowing(),
        given.facts,
        [Example(prompts.JAILBREAKS[0] + f.prompt, f.target) for f in given.facts],
        4096,
    )
    assert single is not None and (found["prompts.jailbreak.prob"].values >= single.prob.values - 1e-6).all()


def test_ridge_is_the_primal_solution() -> None:
    x, y = torch.randn(30, 5).double(), torch.randn(30, 3).double()
    read = probe.fit(x.float(), y.float(), ridge=0.1)
    cx, cy = x - x.mean(0), y - y.mean(0)
    penalty = 0.1 * (cx @ cx.T).diagonal().mean()
    weight = torch.linalg.solve(cx.T @ cx + penalty * torch.eye(5), cx.T @ cy)
    torch.testing.assert_close(read(x.float()), (cx @ weight + y.mean(0)).float(), atol=1e-4, rtol=1e-4)


def test_a_probe_hit_is_the_nearest_answer_in_cosine() -> None:
    rows = torch.eye(4)
    read = torch.tensor([[5.0, 1.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]])
    assert probe.hits(read, torch.tensor([0, 1]), rows).tolist() == [1.0, 0.0]


def test_last_states_are_the_recorded_residual_stream() -> None:
    model = tiny_model("llama")
    encoded = ask_about(model, tiny_facts())["forget"].encoded
    states = probe.last_states(model, encoded, 4096)
    seen: list[torch.Tensor] = []
    blocks = [model.module.get_submodule(name) for name in model.atlas.blocks]
    handles = [
        b.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    with torch.no_grad():
        model.module(torch.tensor([encoded[1].prompt_ids]))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(states[1], torch.stack([h[0, -1] for h in seen]))


def test_probes_need_retained_facts_to_train_on() -> None:
    given = context()
    found = probe.run(knows(), given).items
    assert set(found) == {"probe.top1"} and len(found["probe.top1"].values) == 8
    assert probe.run(knows(), context(retain=given.retain[:4])) == FigureValues()


def test_depth_by_hand() -> None:
    """Layers that hold the knowledge drop by 2 and 1 (0.01 does not count); the edit drops 1 and 3: (1 + 1) / 3."""
    reference = torch.tensor([[0.01, 2.0, 1.0], [0.0, 0.0, 0.01]])
    drop = torch.tensor([[5.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
    score, known = depth.depth_score(drop, reference)
    assert score[0].item() == pytest.approx(2 / 3) and known.tolist() == [True, False]


def test_the_base_patched_into_itself_loses_nothing_and_the_ignorant_model_is_erased() -> None:
    given = context(never_knew=ignorant())
    same = depth.run(State("same", "edit", knowing(), WeightDelta.between(knowing(), knowing())), given).items
    torch.testing.assert_close(same["depth.drop"].values, torch.zeros(8), atol=1e-5, rtol=0)
    assert same["depth.erased"].values.max() < 1e-4
    gone = depth.run(ignorant(), given).items
    assert gone["depth.drop"].values.mean() > 0.5
    torch.testing.assert_close(gone["depth.erased"].values, torch.ones(len(gone["depth.erased"].values)))
    assert "depth.erased" not in depth.run(ignorant(), context()).items, "no score without a retrained model"


def test_the_last_layer_patched_is_the_edited_model_itself() -> None:
    questions = context().questions["forget"]
    drop = depth.drops(State("b", "base", knowing()), ignorant(), questions.encoded, 4096)
    expected = (ask(never_knew(), questions).nll - ask(knowing(), questions).nll) / torch.tensor(
        [e.n_target for e in questions.encoded]
    )
    unembed = [m.module.get_parameter(f"{m.atlas.unembed}.weight") for m in (knowing(), never_knew())]
    assert not torch.equal(*unembed), "so the two need not agree exactly, only in kind"
    assert torch.corrcoef(torch.stack([drop[:, -1], expected]))[0, 1] > 0.5


def test_a_soft_prompt_learns_the_taught_half_and_leaves_the_weights_alone() -> None:
    model = never_knew()
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    questions = context().questions["forget"]
    half = questions.take([0, 1, 2, 3])
    _, start = soft_prompt.attack(model, half, half, soft_prompt.SoftPrompt(steps=1, lr=0.0001), 4096)
    fitted, learned = soft_prompt.attack(model, half, half, soft_prompt.SoftPrompt(steps=40, lr=0.3), 4096)
    assert learned.mean() > start.mean() + 0.02 and torch.equal(fitted, learned)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    found = soft_prompt.run(ignorant(), context()).items
    assert len(found["soft_prompt.prob"].values) == 4


def test_every_attack_gives_only_figures_of_the_table() -> None:
    assert set(ATTACKS) == set(FIGURES_OF)
    assert all(key in FIGURES for keys in FIGURES_OF.values() for key in keys)
    given = context(never_knew=ignorant())
    names = tuple(name for name in NAMES if name != "soft-prompt")
    found = attack_all(names, ignorant(), given)
    assert set(found.items) == {k for name in names for k in FIGURES_OF.get(name, ())}
    assert attacks_of(("all",)) == NAMES and attacks_of(("none",)) == ()
    assert attacks_of(("soft-prompt", "lens")) == ("lens", "soft-prompt"), "in the table's order"
    with pytest.warns(UserWarning, match="dose is now called strength"):
        assert attacks_of(("dose", "lens")) == ("lens", "strength")
    for wrong, message in ((("hypnosis",), "no attack 'hypnosis'"), (("promts",), "did you mean prompts")):
        with pytest.raises(InputError, match=message):
            attacks_of(wrong)
    with pytest.raises(InputError, match="none and others"):
        attacks_of(("none", "lens"))


def test_templates_keep_names_and_lower_what_begins_a_sentence() -> None:
    fact = Fact("a", "The home of Ann is", " Rome", subject="Ann")
    asked = [variant[0].prompt for variant in prompts.templates([fact])]
    assert asked[0] == "It is a fact that the home of Ann is"
    assert asked[-1] == "Here is something about Ann. The home of Ann is"
    named = Fact("b", "Ann lives in the city of", " Rome")
    assert prompts.templates([named])[0][0].prompt == "It is a fact that Ann lives in the city of"
    assert len(prompts.templates([fact, named])) == len(prompts.TEMPLATES) - 1, "one fact has no subject"


def test_the_dose_runs_from_the_base_to_the_edit() -> None:
    base, edited = knowing(), never_knew()
    given = context(settings=AuditSettings(strengths=(0.25, 1.25)))
    curves = [
        strength.run(State("edit", "edit", *who), given).curves
        for who in ((base, WeightDelta.between(base, edited)), (edited,))
    ]
    for found in curves:
        forget = found["strength.forget"]
        assert forget.xs == (0.0, 0.25, 1.0, 1.25)
        torch.testing.assert_close(forget.at[0].values, ask(base, given.questions["forget"]).prob.values)
        torch.testing.assert_close(forget.at[2].values, ask(edited, given.questions["forget"]).prob.values)
    for one, other in zip(curves[0]["strength.forget"].at, curves[1]["strength.forget"].at, strict=True):
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-3)
    assert strength.run(State("control", "control", edited), given) == FigureValues()
    state = State("edit", "edit", base, WeightDelta.between(base, edited))
    questions = given.questions
    known = {
        name: {kind: ask(model, questions[kind]) for kind in ("forget", "held_out")}
        for name, model in (("base", base), ("edit", edited))
    }
    again = strength.run(state, replace(given, answers=known)).curves
    for name, curve in again.items():
        for one, other in zip(curve.at, curves[0][name].at, strict=True):
            torch.testing.assert_close(one.values, other.values), "answers that are known are not asked again"


def test_a_strength_is_a_straight_line_between_the_weights_and_leaves_no_trace() -> None:
    base, edited = knowing(), never_knew()
    before = {n: p.clone() for n, p in base.module.named_parameters()}
    after = dict(edited.module.named_parameters())
    for state in (State("e", "edit", base, WeightDelta.between(base, edited)), State("e", "edit", edited)):
        with state.at_strength(base, 0.25) as model:
            for name, p in model.module.named_parameters():
                torch.testing.assert_close(p, 0.75 * before[name] + 0.25 * after[name], msg=name)
        assert all(torch.equal(p, before[n]) for n, p in base.module.named_parameters())


def test_lora_relearning_is_its_own_attack() -> None:
    given = context(settings=AuditSettings(relearn=RelearnAttack(at=(1, 3))))
    found = relearn_lora.run(ignorant(), given)
    curve = found.curves["relearn.lora"]
    assert curve.xs == (0.0, 1.0, 3.0) and len(curve.at[0].values) == 4
    torch.testing.assert_close(found.items["relearn.lora.prob"].values, curve.at[-1].values)
    assert relearn_lora.run(given.base, given) == FigureValues()


def test_the_truth_ratio_of_facts_is_tofus() -> None:
    """Geometric mean of the wrong targets over the paraphrased right one, folded at 1."""
    fact = replace(context().facts[0], paraphrased_target=" Italy", alternatives=(" Rome", " Paris"))
    model = knowing()
    found = choice.run(knows(), context(facts=[fact])).items["choice.truth_ratio"]
    pairs = [(fact.id, Example(fact.prompt, t)) for t in (" Italy", " Rome", " Paris")]
    answers = ask(model, questions_of(model, pairs))
    right, *wrong = (-answers.nll / answers.n_tokens).exp().tolist()
    ratio = (wrong[0] * wrong[1]) ** 0.5 / right
    assert found.values.item() == pytest.approx(min(ratio, 1 / ratio), rel=1e-4)
