"""Causal tracing as a whole: settings, draws, resuming, refusals, and the numbers of a second implementation."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from locus.errors import InputError
from locus.fact import Fact
from locus.hooks import patched
from locus.model import Model
from locus.tokens import encode
from locus.trace import FactTrace, Trace
from tests.tiny import tiny_facts, tiny_model
from tracing.causal import CausalTrace
from tracing.patching.corruption import Corrupter, Prepared, embed, prepare


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("llama")


def same_scores(a: FactTrace, b: FactTrace, atol: float = 0.0) -> None:
    assert a.kinds == b.kinds
    for kind in a.kinds:
        torch.testing.assert_close(a.scores[kind], b.scores[kind], atol=atol, rtol=0)


def test_against_a_loop_over_cells(model: Model) -> None:
    """ROME's definition, written down: one forward a cell, row 0 clean, the other rows corrupted and restored."""
    fact = tiny_facts()[0]
    settings = CausalTrace(kinds=("block", "mlp"), samples=3, window=2, noise_sd=1.0, metric="prob")
    traced = settings.run(model, [fact])["tower"]
    encoded = encode(model, fact)
    one = prepare(fact, encoded, model.bos, 0)
    noisy = Corrupter.of(model, [one], "gaussian", 3.0, 1.0).inputs(model, one, 3).embeddings
    assert noisy is not None
    start, stop = encoded.subject or (0, 0)
    ids = one.ids.expand(4, -1)

    def corrupt(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[1:, start:stop] = noisy
        return out

    def score(outputs: dict[str, object]) -> float:
        with torch.no_grad(), patched(model.module, {model.atlas.embed: corrupt, **outputs}):  # type: ignore[dict-item]
            logits = model.module(ids).logits[1:, -1]
        return float(logits.softmax(-1)[:, encoded.target_ids[0]].mean())

    for position in range(encoded.target_start):
        for layer in range(model.atlas.n_layers):

            def restore(out: torch.Tensor, position: int = position) -> torch.Tensor:
                out = out.clone()
                out[1:, position] = out[0, position]
                return out

            at_block = score({model.atlas.blocks[layer]: restore})
            around = range(max(0, layer - 1), min(model.atlas.n_layers, layer + 1))
            at_mlp = score({model.atlas.mlp_out[i]: restore for i in around})
            assert float(traced.scores["block"][layer, position]) == pytest.approx(at_block, rel=2e-5)
            assert float(traced.scores["mlp"][layer, position]) == pytest.approx(at_mlp, rel=2e-5)
    assert traced.corrupted_prob == pytest.approx(score({}), rel=2e-5)


@pytest.mark.parametrize("metric", ["prob", "first_prob", "logprob", "logit_diff", "kl", "rank"])
def test_engines_agree_on_every_metric(model: Model, metric: str) -> None:
    settings = CausalTrace(kinds=("block", "attn"), samples=2, metric=metric, direction="noise")  # type: ignore[arg-type]
    facts = tiny_facts()[1:]
    fast, slow = settings.run(model, facts), replace(settings, engine="plain").run(model, facts)
    for fact in facts:
        assert (fast[fact.id].engine, slow[fact.id].engine) == ("replay", "plain")
        same_scores(fast[fact.id], slow[fact.id], atol=2e-5)
        assert fast[fact.id].clean_score == pytest.approx(slow[fact.id].clean_score, abs=2e-5)


def test_nothing_is_restored_before_the_subject(model: Model) -> None:
    fact = CausalTrace(samples=2).run(model, tiny_facts()[:1])["tower"]
    assert fact.subject == (2, 4)
    for kind in fact.kinds:
        assert float(fact.indirect_effect(kind)[:, :2].abs().max()) < 1e-9


def test_facts_do_not_depend_on_each_other(model: Model) -> None:
    settings = CausalTrace(samples=2, noise_sd=0.7)
    facts = tiny_facts()
    together, turned = settings.run(model, facts), settings.run(model, facts[::-1])
    alone = settings.run(model, facts[:1])
    for fact in facts:
        same_scores(together[fact.id], turned[fact.id])
    same_scores(together["tower"], alone["tower"], atol=1e-6)
    one_by_one = replace(settings, batch_tokens=5).run(model, facts)
    for fact in facts:
        same_scores(together[fact.id], one_by_one[fact.id], atol=1e-6)
    assert together["tower"].seed != together["capital"].seed


def test_more_draws_keep_the_first_ones(model: Model) -> None:
    one = prepare(tiny_facts()[0], encode(model, tiny_facts()[0]), model.bos, 5)
    corrupter = Corrupter.of(model, [one], "gaussian", 3.0)
    few, many = (corrupter.inputs(model, one, n).embeddings for n in (2, 5))
    assert few is not None and many is not None
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])


def test_noise_is_three_pooled_standard_deviations(model: Model) -> None:
    """sd over all entries of the subject tokens' embeddings of all facts, each occurrence counted."""
    facts = tiny_facts()
    encoded = [encode(model, fact) for fact in facts]
    ids = [i for e in encoded for i in e.ids[e.subject[0] : e.subject[1]]]  # type: ignore[index]
    expected = float(embed(model, torch.tensor(ids)).double().std())
    trace = CausalTrace(kinds=("block",), samples=1).run(model, facts)
    assert trace.settings["pooled_subject_sd"] == pytest.approx(expected, rel=1e-6)
    assert trace.settings["noise"] == pytest.approx(3 * expected, rel=1e-6)
    one = prepare(facts[0], encoded[0], model.bos, 0)
    noisy = Corrupter.of(model, [one], "gaussian", 3.0, 2.0).inputs(model, one, 400).embeddings
    assert noisy is not None
    assert float((noisy - embed(model, torch.tensor(one.subject_ids))).std()) == pytest.approx(2.0, rel=0.05)
    flat = Corrupter.of(model, [one], "uniform", 3.0, 2.0).inputs(model, one, 400).embeddings
    assert flat is not None
    assert float((flat - embed(model, torch.tensor(one.subject_ids))).abs().max()) == pytest.approx(
        2.0, rel=0.01
    )


def test_without_a_subject_the_whole_prompt_but_bos_is_corrupted(model: Model) -> None:
    fact = Fact(id="q", prompt="Where is the Eiffel Tower? It stands in", target=" Paris")
    with pytest.warns(UserWarning, match="no subject"):
        traced = CausalTrace(kinds=("block",), samples=2).run(model, [fact])["q"]
    assert traced.corrupted == tuple(range(1, len(traced.tokens)))
    assert traced.subject is None


def test_draws_until_the_error_is_small(model: Model) -> None:
    settings = CausalTrace(kinds=("block",), samples=2, metric="logprob", noise_sd=0.5)
    loose = replace(settings, tolerance=100.0).run(model, tiny_facts()[:1])["tower"]
    tight = replace(settings, tolerance=1e-9, max_samples=7).run(model, tiny_facts()[:1])["tower"]
    fixed = replace(settings, samples=7).run(model, tiny_facts()[:1])["tower"]
    assert (loose.samples, tight.samples) == (2, 7)
    same_scores(tight, fixed, atol=1e-6)
    torch.testing.assert_close(
        tight.standard_error["block"], fixed.standard_error["block"], atol=1e-6, rtol=0
    )
    assert float(fixed.standard_error["block"].max()) > 0


class _Killed(BaseException):
    pass


def test_an_interrupted_run_resumes_to_the_same_bytes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, facts = CausalTrace(samples=2, batch_tokens=5), tiny_facts()  # a fact at a time
    settings.run(model, facts, folder=tmp_path / "undisturbed")
    real, calls = CausalTrace._trace, []

    def trace(self: CausalTrace, model: Model, pack: object, *rest: object) -> list[FactTrace]:
        calls.append(pack)
        if len(calls) == 3:
            raise _Killed
        return real(self, model, pack, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalTrace, "_trace", trace)
    with pytest.raises(_Killed):
        settings.run(model, facts, folder=tmp_path / "killed")
    assert not (tmp_path / "killed" / "trace.safetensors").exists()
    settings.run(model, facts, folder=tmp_path / "killed", resume=True)
    assert len(calls) == 4, "only the fact that was interrupted is traced again"
    for name in ("trace.safetensors", "average.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    settings.run(model, facts, folder=tmp_path / "killed", resume=True)
    assert len(calls) == 4, "a finished run has nothing left to do"
    replace(settings, seed=1).run(model, facts, folder=tmp_path / "killed", resume=True)
    assert len(calls) == 7, "another seed is another run"


def test_facts_that_are_traced_together_are_so_whatever_their_order(model: Model, tmp_path: Path) -> None:
    """Two facts fill the calls: they are answered side by side, in an order of their own, and the file is the same."""
    settings, facts = CausalTrace(samples=2, kinds=("block",)), tiny_facts()
    packs: list[list[str]] = []
    real = CausalTrace._trace

    def trace(self: CausalTrace, model: Model, pack: list[Prepared], *rest: object) -> list[FactTrace]:
        packs.append([one.fact.id for one in pack])
        return real(self, model, pack, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalTrace, "_trace", trace)
        for folder, ordered in (("a", facts), ("b", facts), ("c", facts[::-1])):
            settings.run(model, ordered, folder=tmp_path / folder)
    assert packs[0] == packs[1] == packs[2] and len(packs[0]) == 3
    files = [(tmp_path / folder / "trace.safetensors").read_bytes() for folder in "ab"]
    assert files[0] == files[1]
    a, c = (Trace.load(tmp_path / folder) for folder in "ac")
    for fact in facts:
        same_scores(a[fact.id], c[fact.id])


def test_an_edited_fact_is_traced_again(model: Model, tmp_path: Path) -> None:
    settings, fact = CausalTrace(kinds=("block",), samples=1, noise_sd=1.0), tiny_facts()[0]
    settings.run(model, [fact], folder=tmp_path)
    edited = replace(fact, target=" Rome", alternatives=())
    again = settings.run(model, [edited], folder=tmp_path, resume=True)
    assert again["tower"].target == " Rome"
    assert Trace.load(tmp_path)["tower"].target == " Rome"


def test_nan_names_the_layer_and_the_fact() -> None:
    broken = tiny_model("llama", seed=3)
    broken.module.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = float("nan")
    for engine in ("replay", "plain"):
        with pytest.raises(InputError, match=r"'tower'.*layer 1"):
            CausalTrace(samples=1, engine=engine).run(broken, tiny_facts()[:1])  # type: ignore[arg-type]


def test_wrong_input_is_refused_in_one_line(model: Model) -> None:
    fact = tiny_facts()[0]
    for settings, facts, words in (
        (CausalTrace(), [], "no facts"),
        (CausalTrace(), [fact, fact], "two facts are called"),
        (CausalTrace(kinds=("blocks",)), [fact], "kind 'blocks'"),
        (CausalTrace(kinds=("head:9",)), [fact], "heads 0 to 3"),
        (CausalTrace(kinds=("key:2",)), [fact], "heads 0 to 1"),
        (CausalTrace(corruption="swap"), [fact], "no other fact"),
        (CausalTrace(corruption="prompt"), [fact], "no other fact"),
        (CausalTrace(noise_sd=0.0), [fact], "above zero"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            settings.run(model, facts)
        assert "\n" not in str(refused.value)
    for wrong in ({"samples": 0}, {"kinds": ()}, {"window": 0}, {"tolerance": -1.0}):
        with pytest.raises(InputError):
            CausalTrace(**wrong)  # type: ignore[arg-type]


def test_falls_back_loudly_when_the_replay_is_wrong(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracing.replay.replay_engine
    from tracing.patching.runs import RunScores

    real = tracing.replay.replay_engine.answer_by_replay

    def wrong(*args: object, **kwargs: object) -> RunScores:
        answers = real(*args, **kwargs)  # type: ignore[arg-type]
        return replace(answers, cells=answers.cells + 0.1)

    monkeypatch.setattr(tracing.replay.replay_engine, "answer_by_replay", wrong)
    settings = CausalTrace(kinds=("block",), samples=1)
    with pytest.warns(UserWarning, match="differ from whole ones"):
        traced = settings.run(model, tiny_facts()[:1])["tower"]
    assert traced.engine.startswith("plain (replayed forwards differ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_scores(traced, replace(settings, engine="plain").run(model, tiny_facts()[:1])["tower"])
    with pytest.raises(InputError, match="cannot be replayed"):
        replace(settings, engine="replay").run(model, tiny_facts()[:1])


def test_the_file_says_what_was_done(model: Model, tmp_path: Path) -> None:
    trace = CausalTrace(samples=2).run(model, tiny_facts(), folder=tmp_path)
    fact = Trace.load(tmp_path)["capital"]
    assert fact.patched_forwards == 3 * 3 * len(fact.tokens) * 2
    assert fact.tokens[-1] == " Germany" and fact.target == " is Berlin"
    assert trace.work["seconds"] > 0 and trace.work["tokens"] > 0
    assert 0 < trace.work["flops"] < trace.work["matrix_peak_flops_per_second"] * 1e3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "average.json",
        "trace.json",
        "trace.safetensors",
    ]


def test_all_tokens_of_the_subject_together(model: Model) -> None:
    """A column restores its whole stretch: before, subject (2, 3), between, last; the plain engine agrees."""
    settings = CausalTrace(kinds=("block",), samples=2, together=True, metric="logprob")
    fact = settings.run(model, tiny_facts()[:1])["tower"]
    grid = fact.scores["block"]
    for a, b in ((2, 4), (4, 8)):
        assert torch.equal(grid[:, a:b], grid[:, a : a + 1].expand(-1, b - a))
    one_by_one = replace(settings, together=False).run(model, tiny_facts()[:1])["tower"]
    torch.testing.assert_close(grid[:, 8], one_by_one.scores["block"][:, 8], atol=2e-5, rtol=0)
    assert not torch.allclose(grid[:, 2:8], one_by_one.scores["block"][:, 2:8], atol=1e-3)
    same_scores(fact, replace(settings, engine="plain").run(model, tiny_facts()[:1])["tower"], atol=2e-5)


@pytest.mark.parametrize("metric", ["logprob", "prob", "kl"])
def test_verifying_everything_is_exact(model: Model, metric: str) -> None:
    settings = CausalTrace(kinds=("block", "block-no-mlp", "head:1"), samples=2, metric=metric)  # type: ignore[arg-type]
    exact = settings.run(model, tiny_facts()[:1])["tower"]
    hybrid = replace(settings, method="hybrid", verify=1.0).run(model, tiny_facts()[:1])["tower"]
    same_scores(hybrid, exact, atol=1e-6)
    assert all(grid.all() for grid in hybrid.verified.values())
    assert set(hybrid.rank_correlation) == {"block", "head:1"}
    assert all(-1 <= r <= 1 for r in hybrid.rank_correlation.values())


def test_hybrid_is_exact_where_it_says_so(model: Model, tmp_path: Path) -> None:
    settings = CausalTrace(kinds=("block", "mlp"), samples=2, window=1, metric="logprob")
    exact = settings.run(model, tiny_facts()[:1])["tower"]
    trace = replace(settings, method="hybrid", verify=0.3).run(model, tiny_facts()[:1], folder=tmp_path)
    hybrid = Trace.load(tmp_path)["tower"]
    for kind, grid in hybrid.verified.items():
        torch.testing.assert_close(hybrid.scores[kind][grid], exact.scores[kind][grid], atol=2e-5, rtol=0)
        assert int(grid[:, 2:].sum()) == round(0.3 * 3 * 7)
        assert not torch.allclose(hybrid.scores[kind][~grid], exact.scores[kind][~grid], atol=1e-5)
    assert trace["tower"].patched_forwards == 2 * round(0.3 * 3 * 7) * 2
    plain = replace(settings, method="attribution").run(model, tiny_facts()[:1])["tower"]
    assert plain.patched_forwards == 0 and not plain.verified["block"][:, 2:].any()


def test_a_tolerance_needs_two_draws() -> None:
    """The standard error of one draw is not known; it is not 0."""
    trace = CausalTrace(kinds=("block",), samples=1, tolerance=1e-9, max_samples=4)
    assert trace.run(tiny_model("llama"), [tiny_facts()[0]]).facts[0].samples == 4


def test_swapped_in_subjects_have_other_answers() -> None:
    """Four facts, two of one answer: its donors are the other two, and a relation of one answer is warned of."""
    model = tiny_model("llama")
    facts = [
        replace(tiny_facts()[0], id=f"{i}", target=target) for i, target in enumerate((" Paris", " Rome"))
    ]
    twin = replace(facts[0], id="twin", prompt="The city of Rome is in the city of", subject="Rome")
    other = replace(facts[1], id="other", prompt="The city of Berlin is in the city of", subject="Berlin")
    some = [prepare(fact, encode(model, fact), model.bos, 0) for fact in (facts[0], twin, other)]
    corrupter = Corrupter.of(model, some, "swap", 3.0)
    assert [p.fact.id for p in corrupter._donors(some[0])] == ["other"]
    with pytest.warns(UserWarning, match="every other fact has the same answer"):
        alone = Corrupter.of(model, some[:2], "swap", 3.0)
        assert len(alone._donors(some[0])) == 2
