"""The replay engine gives what whole forwards give: every architecture, site, corruption, batch size."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from locus.fact import Fact
from locus.model import Model
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model
from tracing.patching.corruption import CORRUPTIONS, Corrupter, Prepared, prepare
from tracing.patching.plain_engine import answer_plainly
from tracing.patching.readout import Readout
from tracing.patching.runs import Asked, Inputs, PatchingQuestion, RunScores
from tracing.patching.sites import KINDS, Patch, PatchedRun, cells_of
from tracing.replay.blocks import CannotReplay
from tracing.replay.context import side_by_side
from tracing.replay.recorded_runs import Runs, record_runs
from tracing.replay.replay_engine import answer_by_replay, answer_together


def prepared(model: Model, facts: list[Fact] | None = None) -> list[Prepared]:
    return [prepare(fact, encode(model, fact), model.bos, 0) for fact in facts or tiny_facts()]


def question_of(
    model: Model, facts: list[Prepared], index: int, corruption: str = "gaussian", samples: int = 3
) -> tuple[PatchingQuestion, Readout]:
    fact = facts[index]
    corrupter = Corrupter.of(model, facts, corruption, 3.0)  # type: ignore[arg-type]
    question = PatchingQuestion(corrupter.inputs(model, fact, samples), Inputs(fact.ids), fact.reads)
    return question, Readout("logprob", torch.tensor(fact.encoded.target_ids))


def grid(model: Model, fact: Prepared, kinds: tuple[str, ...] = (), window: int = 2) -> list[PatchedRun]:
    """Cells of these kinds; of all, where none are given."""
    positions = range(fact.encoded.target_start)
    kinds = kinds or (*KINDS, "head:1", *(("query:3", "key:1", "value:1") if model.atlas.attn_q else ()))
    heads = model.atlas.n_kv_heads
    kinds = tuple(f"{kind.partition(':')[0]}:0" if heads < 2 and ":1" in kind else kind for kind in kinds)
    return [c for kind in kinds for row in cells_of(kind, model.atlas, positions, window) for c in row]


def assert_same(got: RunScores, expected: RunScores, atol: float = 2e-5) -> None:
    """Log-probabilities agree: relative differences of the probabilities are below `atol`."""
    for a, b in ((got.base, expected.base), (got.other, expected.other), (got.cells, expected.cells)):
        torch.testing.assert_close(a[..., 0], b[..., 0].expand_as(a[..., 0]), atol=atol, rtol=0)
        torch.testing.assert_close(a[..., 1], b[..., 1].expand_as(a[..., 1]), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_both_directions(arch: str) -> None:
    model = tiny_model(arch)
    facts = prepared(model)
    for index in (0, 1):  # a subject in the middle; at the end, before a target of several tokens
        question, readout = question_of(model, facts, index, samples=2)
        cells = grid(model, facts[index])
        for asked in (question, question.reversed()):
            expected = answer_plainly(model, asked, cells, readout)
            got = answer_by_replay(model, asked, cells, readout)
            assert_same(got, expected)
            assert got.tokens < expected.tokens / 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
        ("neox", {"use_parallel_residual": False}),
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
        ("gemma3", {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"num_key_value_heads": 1}),
    ],
)
def test_variants_of_attention(arch: str, settings: dict[str, object], attention: str) -> None:
    if arch == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma-2 has no sdpa")
    model = tiny_model(arch, attn_implementation=attention, **settings)
    facts = prepared(model)
    question, readout = question_of(model, facts, 0, samples=2)
    cells = grid(model, facts[0], ("block", "mlp", "block-no-attn"))
    assert_same(
        answer_by_replay(model, question, cells, readout), answer_plainly(model, question, cells, readout)
    )


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_every_corruption(corruption: str) -> None:
    model = tiny_model("qwen3")
    facts = tiny_facts()
    twin = replace(facts[0], id="twin", prompt=facts[0].prompt.replace("city of", "city in"), target=" Rome")
    known = prepared(model, [*facts, twin])
    question, readout = question_of(model, known, 0, corruption)
    cells = grid(model, known[0])
    assert_same(
        answer_by_replay(model, question, cells, readout), answer_plainly(model, question, cells, readout)
    )


def odd_cells(model: Model, n_pos: int) -> list[PatchedRun]:
    """Patches that no grid makes: several positions and layers at once, neurons, zeros and means, mixtures."""
    last, end = n_pos - 1, model.atlas.n_layers
    return [
        PatchedRun((Patch("resid_post", (0, 1), (2, 3, 5)),)),
        PatchedRun((Patch("resid_post", (0, 2), (4, last)),)),
        PatchedRun((Patch("resid_pre", (0, 1), (3,)),)),
        PatchedRun((Patch("resid_pre", (1, 2), (last,)),)),
        PatchedRun((Patch("mlp_post", (1, 2), (3, 4), columns=(0, 7, 31)),)),
        PatchedRun((Patch("z", (0, end), (5,), columns=(0, 1, 2)),)),
        PatchedRun((Patch("mlp_out", (1, 2), (1, 4), "zero"),)),
        PatchedRun((Patch("mlp_out", (0, 1), (0,), "zero"),)),
        PatchedRun((Patch("attn_out", (1, 3), (last,), "mean"),)),
        PatchedRun((Patch("resid_post", (end - 1, end), (last,)),)),
        PatchedRun((Patch("resid_post", (end - 1, end), (2,)),)),
        PatchedRun(
            (
                Patch("mlp_out", (0, 1), (4,)),
                Patch("attn_out", (1, 2), (6,)),
                Patch("resid_post", (1, 2), (5,)),
            )
        ),
        PatchedRun(
            (Patch("resid_post", (0, 1), (3,)), Patch("mlp_post", (1, 2), (last,), "zero", columns=(3,)))
        ),
        PatchedRun((Patch("mlp_out", (1, 1), (4,)),)),
        PatchedRun(()),
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "falcon", "olmo2"])
def test_sets_of_positions_neurons_zeros_and_means(arch: str) -> None:
    model = tiny_model(arch)
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    generator = torch.Generator().manual_seed(1)
    mean = {("attn_out", layer): torch.randn(model.atlas.d_model, generator=generator) for layer in range(3)}
    question = replace(question, means=mean)  # type: ignore[arg-type]
    cells = odd_cells(model, question.reads[0] + 1)
    assert_same(
        answer_by_replay(model, question, cells, readout), answer_plainly(model, question, cells, readout)
    )


def test_ablation_without_a_second_run() -> None:
    """Zero ablation of the clean run: base and other are the same, and nothing diverges."""
    model = tiny_model("smollm")
    fact = prepared(model)[0]
    clean = Inputs(fact.ids)
    question = PatchingQuestion(clean, clean, fact.reads)
    readout = Readout("logprob", torch.tensor(fact.encoded.target_ids))
    cells = [
        PatchedRun((Patch("mlp_out", (layer, layer + 1), (p,), "zero"),))
        for layer in range(3)
        for p in (0, 3, 8)
    ]
    assert_same(
        answer_by_replay(model, question, cells, readout), answer_plainly(model, question, cells, readout)
    )


@pytest.mark.parametrize("budget", [1, 7, 40, 100000])
def test_results_do_not_depend_on_the_budget(budget: int) -> None:
    model = tiny_model("llama")
    facts = prepared(model)
    question, readout = question_of(model, facts, 0, samples=3)
    cells = grid(model, facts[0])
    expected = answer_by_replay(model, question, cells, readout)
    got = answer_by_replay(model, question, cells, readout, batch_tokens=budget)
    assert_same(got, expected, atol=1e-5)


def test_rows_before_the_corruption_are_exactly_the_corrupted_run() -> None:
    model = tiny_model("llama")
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    start = facts[0].positions[0]
    cells = [c for row in cells_of("block", model.atlas, range(start), 1) for c in row]
    got = answer_by_replay(model, question, cells, readout)
    assert torch.equal(got.cells, got.base.expand(len(cells), -1, -1))


def test_all_restored_is_exactly_the_clean_run() -> None:
    """Restoring every corrupted position at the first block's input leaves nothing of the corruption."""
    model = tiny_model("llama")
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    whole = PatchedRun((Patch("resid_pre", (0, 1), facts[0].positions),))
    got = answer_by_replay(model, question, [whole], readout)
    torch.testing.assert_close(got.cells[0], got.other.expand(3, -1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.bfloat16, 0.25), (torch.float16, 0.05), (torch.float64, 1e-9)]
)
def test_other_precisions(dtype: torch.dtype, atol: float) -> None:
    model = tiny_model("llama")
    model.module.to(dtype)
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    cells = grid(model, facts[0])
    expected = answer_plainly(model, question, cells, readout)
    got = answer_by_replay(model, question, cells, readout)
    torch.testing.assert_close(got.cells[..., 0], expected.cells[..., 0], atol=atol, rtol=0)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_facts_of_different_length_together(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three facts side by side, denoising and noising mixed, give what each gives alone by whole forwards."""
    import tracing.replay.replay_engine

    model = tiny_model(arch)
    facts = prepared(model)
    asked = []
    for index, fact in enumerate(facts):
        question, readout = question_of(model, facts, index, samples=2)
        question = question.reversed() if index == 1 else question
        asked.append(Asked(question, grid(model, fact, ("block", "mlp", "block-no-attn", "head:0")), readout))
    groups: list[list[list[int]]] = []
    real = tracing.replay.replay_engine.side_by_side

    def watched(runs: list[Runs]) -> list[list[int]]:
        groups.append(real(runs))
        return groups[-1]

    monkeypatch.setattr(tracing.replay.replay_engine, "side_by_side", watched)
    for budget in (None, 50):
        got = answer_together(model, asked, batch_tokens=budget)
        for one, answers in zip(asked, got, strict=True):
            assert_same(answers, answer_plainly(model, one.question, one.cells, one.readout))
    assert groups == [[[0, 1, 2]]] * 2, "all of them shared calls"


def test_questions_that_cannot_share_calls_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers of draws; rotary tables that change with the length of the prompt."""
    model = tiny_model("llama")
    facts = prepared(model)
    questions = [question_of(model, facts, i, samples=n)[0] for i, n in ((0, 2), (1, 3), (2, 2))]
    runs = [record_runs(model, question, (), (), 100) for question in questions]
    assert side_by_side(runs) == [[0, 2], [1]]
    stretched = tiny_model(
        "llama",
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        max_position_embeddings=8,
    )
    assert questions[0].n_pos > 8 > questions[2].n_pos - 2
    runs = [record_runs(stretched, question, (), (), 100) for question in (questions[0], questions[2])]
    assert side_by_side(runs) == [[0], [1]]


def test_running_out_of_memory_halves_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracing.replay.replay_engine

    model = tiny_model("llama")
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    cells = grid(model, facts[0], ("block",))
    expected = answer_by_replay(model, question, cells, readout)
    real, budgets = tracing.replay.replay_engine._answer, []

    def answer(model: Model, asked: list[Asked], budget: int) -> list[RunScores]:
        budgets.append(budget)
        if budget > 100:
            raise torch.OutOfMemoryError("no memory")
        return real(model, asked, budget)

    monkeypatch.setattr(tracing.replay.replay_engine, "_answer", answer)
    assert_same(answer_by_replay(model, question, cells, readout, batch_tokens=300), expected)
    assert budgets == [300, 150, 75]


def test_running_out_of_memory_parts_questions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracing.replay.replay_engine

    model = tiny_model("llama")
    facts = prepared(model)
    asked = [
        Asked(question, grid(model, facts[i], ("block",)), readout)
        for i in range(3)
        for question, readout in [question_of(model, facts, i)]
    ]
    real, tried = tracing.replay.replay_engine._answer, []

    def answer(model: Model, asked: list[Asked], budget: int) -> list[RunScores]:
        tried.append((len(asked), budget))
        if len(asked) > 1 or budget > 100:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return real(model, asked, budget)

    monkeypatch.setattr(tracing.replay.replay_engine, "_answer", answer)
    got = answer_together(model, asked, batch_tokens=200)
    assert tried == [(3, 200), (1, 200), (1, 100), (2, 200), (1, 200), (1, 100), (1, 200), (1, 100)]
    for one, answers in zip(asked, got, strict=True):
        assert_same(answers, answer_plainly(model, one.question, one.cells, one.readout))
    with pytest.raises(RuntimeError, match="something else"):
        monkeypatch.setattr(
            tracing.replay.replay_engine,
            "_answer",
            lambda *_: (_ for _ in ()).throw(RuntimeError("something else")),
        )
        answer_together(model, asked)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral"])
def test_attention_that_takes_no_mask_is_replaced_while_replaying(arch: str) -> None:
    """A kernel that makes its own mask, as flash attention does, stands in for it; the model has it back after."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("own_mask", sdpa_attention_forward)
    AttentionMaskInterface.register("own_mask", sdpa_mask)
    model = tiny_model(arch)
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    cells = grid(model, facts[0], ("block", "attn"))
    expected = answer_plainly(model, question, cells, readout)
    model.module.set_attn_implementation("own_mask")
    got = answer_by_replay(model, question, cells, readout)
    assert model.module.config._attn_implementation == "own_mask"
    if arch != "gemma2":  # whose soft-capping no implementation but eager and flash has
        assert_same(got, answer_plainly(model, question, cells, readout))
    assert_same(got, expected)


def test_an_argument_that_is_not_understood_is_refused() -> None:
    model = tiny_model("llama")
    facts = prepared(model)
    question, readout = question_of(model, facts, 0)
    handle = model.module.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "per_layer_input": torch.zeros(1)}), with_kwargs=True
    )
    with contextlib.closing(contextlib.ExitStack()) as undo:
        undo.callback(handle.remove)
        with pytest.raises(CannotReplay, match="per_layer_input"):
            answer_by_replay(model, question, grid(model, facts[0], ("block",)), readout)


def test_a_long_prompt_on_a_small_budget() -> None:
    """4,096 tokens, the subject near the end, eight rows at a time: as whole forwards, and no call sees more rows."""
    model = tiny_model("smollm", max_position_embeddings=8192, num_hidden_layers=2)
    fact = prepared(model)[0]
    filler = torch.randint(5, 300, (4096 - len(fact.ids),), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([filler, fact.ids])
    positions = tuple(p + len(filler) for p in fact.positions)
    noise = torch.randn(2, len(positions), model.atlas.d_model, generator=torch.Generator().manual_seed(1))
    question = PatchingQuestion(Inputs(ids, positions, noise), Inputs(ids), (len(ids) - 1,))
    readout = Readout("logprob", torch.tensor(fact.encoded.target_ids[:1]))
    cells = [cells_of("block", model.atlas, [p], 1)[0][0] for p in (positions[0], positions[1], len(ids) - 2)]
    calls: list[int] = []

    def count(_: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"]).shape[:2].numel())

    block = model.module.get_submodule(model.atlas.blocks[1])
    with contextlib.ExitStack() as undo:
        undo.callback(block.register_forward_pre_hook(count, with_kwargs=True).remove)
        got = answer_by_replay(model, question, cells, readout, batch_tokens=8)
    assert calls[0] == 4096 and max(calls[1:]) <= 16, "one recording, then the rows that change"
    assert_same(got, answer_plainly(model, question, cells, readout))
