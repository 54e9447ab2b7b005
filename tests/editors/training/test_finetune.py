"""The loop: it forgets, keeps the contract, resumes to the bit, stops when it should, and says no clearly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from editors.objectives.dpo import DPO
from editors.objectives.ga import GA
from editors.objectives.graddiff import GradDiff
from editors.objectives.npo import NPO
from editors.objectives.rmu import RMU
from editors.refusals import refusal
from editors.training import reference
from editors.training.finetune import Run
from editors.training.latent_adversary import LatentAttack
from editors.training.retain import Retain
from editors.training.settings import Training
from editors.training.unchanged import MaskLeak, every_digest
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import Batch, measure
from locus.hooks import patched
from locus.mask import WeightMask
from locus.model import Model
from locus.selection import Selection
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model

TEXT = ("Berlin is the capital and the largest city of Germany", "What language does he speak? French")


def known_facts(model: Model) -> tuple[list[Fact], list[Fact]]:
    """Facts whose target is what the random model says anyway: two to forget, three to retain."""
    words = ("The", " city", " of", " Germany", " Paris", " Rome", " speaks", " French", " Berlin", " Tower")
    prompts = [a + b + c for a in words for b in words[1:] for c in words[1:]]
    blank = dataclasses.replace(tiny_facts()[0], subject=None, paraphrases=(), neighbours=(), alternatives=())
    facts: list[Fact] = []
    for prompt in prompts[:: len(words) + 3]:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            first = int(model.module(input_ids=ids).logits[0, -1].argmax())
        target = model.tokenizer.decode([first])
        if model.tokenizer(prompt + target).input_ids == [*ids[0].tolist(), first]:
            facts.append(dataclasses.replace(blank, id=str(len(facts)), prompt=prompt, target=target))
        if len(facts) == 5:
            return facts[:2], facts[2:]
    raise AssertionError("the tiny model says nothing that can be encoded")


def neuron_mask(model: Model) -> WeightMask:
    """A third of the neurons of every layer."""
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[:, ::3] = True
    return WeightMask.of_neurons(model.atlas, chosen, fingerprint=model.fingerprint)


QUICK = Training(steps=12, min_steps=3, lr=0.02, check_every=4, save_every=4, utility=0.0)


def same(a: WeightDelta, b: WeightDelta) -> bool:
    """Whether two deltas are equal to the bit."""
    return a.id == b.id and all(torch.equal(a.changes[n].new, b.changes[n].new) for n in a.changes)


@pytest.mark.parametrize("editor", [NPO(training=QUICK), GradDiff(training=QUICK), GA(training=QUICK)])
def test_forgets_and_leaves_the_model_in_memory_as_it_was(editor: NPO) -> None:
    model = tiny_model("smollm")
    forget, retain = known_facts(model)
    before, digests = measure(model, forget), every_digest(model.module)
    assert before.correct.all()
    delta = editor.run(model, forget, retain, neuron_mask(model), text=TEXT)
    assert every_digest(model.module) == digests
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())
    with delta.applied(model):
        after = measure(model, forget)
        assert not after.correct.any() and after.prob.mean() < 0.2 * before.prob.mean()
    assert delta.outside(neuron_mask(model)) == 0
    assert delta.provenance["stopped"] == "goal"
    assert delta.provenance["editor"]["name"] == type(editor).__name__


def test_the_delta_behaves_as_the_deltas_did_in_training() -> None:
    """The probability after the last step is what the exported weights give."""
    model = tiny_model("gpt2")
    forget, retain = known_facts(model)
    records: list[dict[str, float]] = []
    one_more = dataclasses.replace(QUICK, steps=5, goal=0.0)
    delta = NPO(training=dataclasses.replace(one_more, steps=4)).run(
        model, forget, retain, neuron_mask(model), text=TEXT
    )
    NPO(training=one_more).run(model, forget, retain, neuron_mask(model), text=TEXT, log=records.append)
    with delta.applied(model):
        assert float(measure(model, forget).prob.mean()) == pytest.approx(records[4]["forget_prob"], rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    mask = neuron_mask(model)
    few = Retain(facts=1)
    editor = NPO(training=QUICK, retain=few)
    assert same(editor.run(model, forget, retain, mask), editor.run(model, forget, retain, mask))
    other = NPO(training=dataclasses.replace(QUICK, seed=1), retain=few)
    assert not same(editor.run(model, forget, retain, mask), other.run(model, forget, retain, mask))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sophia"])
def test_a_killed_run_goes_on_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    mask = neuron_mask(model)
    training = dataclasses.replace(
        QUICK,
        optimizer=optimizer,
        goal=0.0,
        momentum=0.9,
        weight_decay=0.01,
        clip=0.1,
        schedule="cosine",
        warmup=3,
        forget_per_step=1,
        batch_tokens=12,
    )
    editor = NPO(training=training, retain=Retain(facts=2))
    whole: list[dict[str, float]] = []
    undisturbed = editor.run(model, forget, retain, mask, text=TEXT, log=whole.append)

    class Killed(Exception):
        pass

    def kill_at_six(record: dict[str, float]) -> None:
        if record["step"] == 6:
            raise Killed

    with pytest.raises(Killed):
        editor.run(model, forget, retain, mask, text=TEXT, folder=tmp_path, log=kill_at_six)
    resumed: list[dict[str, float]] = []
    delta = editor.run(
        model, forget, retain, mask, text=TEXT, folder=tmp_path, resume=True, log=resumed.append
    )
    assert resumed == whole and len(whole) == 12
    assert same(delta, undisturbed)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    mask = neuron_mask(model)
    NPO(training=QUICK).run(model, forget, retain, mask, folder=tmp_path)
    with pytest.raises(InputError, match="begun with other settings"):
        NPO(beta=0.2, training=QUICK).run(model, forget, retain, mask, folder=tmp_path, resume=True)
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[:, 1::3] = True  # as many others, so that every delta has the same shape
    other = WeightMask.of_neurons(model.atlas, chosen, fingerprint=model.fingerprint)
    with pytest.raises(InputError, match="begun with other settings, mask"):
        NPO(training=QUICK).run(model, forget, retain, other, folder=tmp_path, resume=True)


def test_gradient_accumulation_changes_nothing_but_rounding() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    deltas = []
    for batch_tokens in (4096, 1):
        training = dataclasses.replace(QUICK, steps=2, batch_tokens=batch_tokens, optimizer="sgd")
        deltas.append(NPO(training=training).run(model, forget, retain, neuron_mask(model), text=TEXT))
    for name, change in deltas[0].changes.items():
        torch.testing.assert_close(change.new, deltas[1].changes[name].new, rtol=1e-3, atol=1e-4)


def test_held_out_facts_are_never_trained_on() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    mask = neuron_mask(model)
    hidden = [*retain, dataclasses.replace(retain[0], id="secret", prompt="Rome and", held_out=True)]
    editor = NPO(training=QUICK)
    assert same(editor.run(model, forget, retain, mask), editor.run(model, forget, hidden, mask))
    with pytest.raises(InputError, match="no data"):
        editor.run(model, forget, hidden[-1:], mask)


def test_paraphrases_and_neighbours_are_never_trained_on() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    more = [
        dataclasses.replace(fact, paraphrases=("Rome is",), neighbours=(Example("Berlin is", " Rome"),))
        for fact in forget
    ]
    editor = NPO(training=QUICK)
    mask = neuron_mask(model)
    assert same(editor.run(model, forget, retain, mask), editor.run(model, more, retain, mask))


def test_a_collapsing_run_is_stopped_and_gives_what_still_held() -> None:
    """At this rate everything is forgotten at once: the only state that held is the one before the first step."""
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    training = Training(steps=40, lr=0.5, goal=0.0, floor=0.0, check_every=5)
    delta = GA(training=training).run(model, forget, retain, neuron_mask(model))
    assert delta.provenance["stopped"] == "utility floor"
    assert delta.provenance["steps"] == 0
    assert not delta.changes


def test_what_is_less_probable_than_chance_is_flagged() -> None:
    """Ascent without a floor drives the targets below one in the vocabulary; one gentle step does not."""
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    far = Training(steps=30, lr=0.1, goal=0.0, floor=0.0, utility=0.0, max_kl=0.0)
    near = dataclasses.replace(far, steps=1, lr=1e-4)
    flags = [
        GA(training=training).run(model, forget, retain, neuron_mask(model)).provenance["over_forgotten"]
        for training in (far, near)
    ]
    assert flags == [[fact.id for fact in forget], []]


def test_attention_weights_can_be_what_is_located() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    shape = tuple(model.module.model.layers[1].self_attn.v_proj.weight.shape)
    mask = WeightMask(
        {"model.layers.1.self_attn.v_proj.weight": Selection("rows", torch.arange(0, shape[0], 2), shape)}
    )
    delta = NPO(training=dataclasses.replace(QUICK, steps=3)).run(model, forget, retain, mask)
    assert set(delta.changes) == set(mask.entries) and delta.outside(mask) == 0


def test_facts_that_are_gone_are_not_pushed() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    records: list[dict[str, float]] = []
    training = dataclasses.replace(QUICK, steps=40, goal=0.0, utility=0.0, floor=0.05)
    GA(training=training).run(model, forget, retain, neuron_mask(model), log=records.append)
    assert records[0]["active"] == 1.0
    assert records[-1]["active"] < 1.0
    assert records[-1]["forget_prob"] > 1e-6


def test_a_loss_that_is_no_number_names_the_step() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    training = Training(lr=1e30, clip=0.0, utility=0.0, max_kl=0.0)
    with pytest.raises(
        InputError, match=r"step \d+: the .* is (nan|inf); lower the learning rate \(now 1e\+30\)"
    ):
        NPO(training=training).run(model, forget, retain, neuron_mask(model))


def test_it_names_the_fact_and_the_layer_that_it_comes_from() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    one = encode(model, forget[1]).ids
    seen: dict[str, torch.Tensor] = {}

    def note(ids: torch.Tensor) -> None:
        seen["ids"] = ids

    def spoil(state: torch.Tensor) -> torch.Tensor:
        """Infinity at the end of the second fact, once the reference has been measured."""
        seen["calls"] = seen.get("calls", 0) + 1
        own = torch.tensor([list(row[: len(one)]) == list(one) for row in seen["ids"].tolist()])
        return torch.where(own[:, None, None] & (seen["calls"] > 3), torch.inf, state)

    with (
        patched(model.module, {model.atlas.blocks[1]: spoil}, {model.atlas.embed: note}),
        pytest.raises(
            InputError, match=r"step \d: the .* is nan; .*; it arises in layer 1, of fact '1' first"
        ),
    ):
        NPO(training=QUICK).run(model, forget, retain, neuron_mask(model))


def test_nothing_to_forget_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="nothing to forget"):
        NPO().run(model, [], [], neuron_mask(model))


def test_a_planted_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    honest = Run.take_step

    def leaking(run: Run, state: object) -> dict[str, object]:
        weight = run.model.module.get_parameter("model.layers.1.self_attn.q_proj.weight")
        weight.data[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        return honest(run, state)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "take_step", leaking)
    with pytest.raises(MaskLeak, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        NPO(training=QUICK).run(model, forget, retain, neuron_mask(model))


def test_both_uses_of_a_tied_embedding_learn() -> None:
    model = tiny_model("smollm")
    forget, retain = known_facts(model)
    shape = tuple(model.module.lm_head.weight.shape)
    mask = WeightMask({"model.embed_tokens.weight": Selection("rows", torch.arange(0, shape[0], 2), shape)})
    delta = NPO(training=QUICK).run(model, forget, retain, mask, text=TEXT)
    with delta.applied(model):
        assert not measure(model, forget).correct.any()


def test_checkpointing_changes_memory_alone() -> None:
    model = tiny_model("gpt2")
    forget, retain = known_facts(model)
    mask = neuron_mask(model)
    few = dataclasses.replace(QUICK, steps=3)
    kept = NPO(training=few).run(model, forget, retain, mask, text=TEXT)
    recomputed = dataclasses.replace(few, checkpointing=True)
    assert same(kept, NPO(training=recomputed).run(model, forget, retain, mask, text=TEXT))
    assert not any("forward" in m.__dict__ for m in model.module.modules())


def test_an_adversary_inside_the_steps_changes_what_is_learnt() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    mask = neuron_mask(model)
    few = dataclasses.replace(QUICK, steps=3, goal=0.0)
    attacked = dataclasses.replace(few, attack=LatentAttack(steps=3, epsilon=1.0, lr=0.5))
    plain = NPO(training=few).run(model, forget, retain, mask)
    hardened = NPO(training=attacked).run(model, forget, retain, mask)
    assert not same(plain, hardened)
    assert same(hardened, NPO(training=attacked).run(model, forget, retain, mask))


def test_a_refusal_becomes_likelier_and_the_target_less_likely() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    refusals = [refusal(fact, 0) for fact in forget]
    before = measure(model, [*forget, *refusals]).nll
    delta = DPO(training=QUICK).run(model, forget, retain, neuron_mask(model))
    with delta.applied(model):
        change = measure(model, [*forget, *refusals]).nll - before
    assert (change[:2] > 1).all() and (change[2:] < change[:2]).all()


def test_the_base_is_asked_once_for_each_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fact's own answers the scores are known from the start; refusals come again only where they were drawn."""
    model = tiny_model("smollm")
    forget, retain = known_facts(model)
    asked: list[tuple[int, ...]] = []
    plain = reference.label_states

    def counted(model: Model, batch: Batch) -> torch.Tensor:
        asked.append(tuple(batch.ids[0].tolist()))
        return plain(model, batch)

    monkeypatch.setattr(reference, "label_states", counted)
    DPO(training=QUICK, retain=Retain(term="none")).run(model, forget, retain, neuron_mask(model))
    assert len(asked) == len(set(asked)) <= QUICK.steps * len(forget) and asked


def test_a_mask_above_what_the_objective_runs_is_refused() -> None:
    """RMU on a model of 3 layers steers the output of layer 0; the mask lies in layer 2."""
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
    chosen[2] = True
    with pytest.raises(InputError, match="no located weight influences the loss"):
        RMU().run(model, forget, retain, WeightMask.of_neurons(model.atlas, chosen))


def test_jangs_rule_stops_ascent() -> None:
    model = tiny_model("llama")
    forget, retain = known_facts(model)
    slow = Training(steps=60, min_steps=1, lr=0.01, goal=0.0, check_every=2, utility=0.0)
    rule = GA(training=slow, stop_memorization=0.5, stop_extraction=0.5)
    delta = rule.run(model, forget, retain, neuron_mask(model))
    assert delta.provenance["stopped"] == "goal" and delta.provenance["steps"] < 60
    with delta.applied(model):
        assert measure(model, forget).correct.float().mean() <= 0.5
