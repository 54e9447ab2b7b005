"""Several processes, one edit: the delta of one process, whether each holds the model or a part of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from editors import NPO, OBJECTIVES, RMU
from editors.adversary import LatentAttack
from editors.finetune import Run
from editors.guard import MaskLeak
from editors.team import Piece, Team
from editors.training import Training
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.forward import batches
from locus.mask import WeightMask
from locus.model import Model, load_model
from locus.ranks import ALONE, Ranks, joined
from locus.sharded import local
from locus.tokens import Encoded
from tests.editors.test_contract import KINDS, mask_of
from tests.editors.test_finetune import TEXT, known_facts, neuron_mask, same
from tests.forked import job
from tests.tiny import save_tiny, tiny_model

FEW = Training(
    steps=2, lr=0.05, optimizer="sgd", momentum=0.9, check_every=2, save_every=2, goal=0.0, forget_per_step=3
)
NEURONS = ("neurons",)
PLAIN: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "every kind of mask": (NPO(training=FEW), KINDS),
    "neurons by AdamW": (NPO(training=Training(steps=2, goal=0.0)), NEURONS),
}
COMPOSED: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "checkpointing": (NPO(training=dataclasses.replace(FEW, checkpointing=True)), KINDS),
    "a forward cut short": (RMU(layer=2, training=dataclasses.replace(FEW, steps=1)), KINDS),
    "the lens": (OBJECTIVES["head-projection"](training=dataclasses.replace(FEW, steps=1)), NEURONS),
    "an adversary": (NPO(training=dataclasses.replace(FEW, steps=1, attack=LatentAttack(steps=1))), NEURONS),
    "a floor": (NPO(training=dataclasses.replace(FEW, floor=0.2)), NEURONS),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of an architecture's tiny model."""
    place = tmp_path_factory.mktemp("team")

    def folder(arch: str) -> Path:
        if not (place / arch).exists():
            save_tiny(tiny_model(arch), place / arch)
        return place / arch

    return folder


def edit(
    model: Model, facts: Any, editor: Any, kinds: tuple[str, ...], ranks: Ranks = ALONE, **more: Any
) -> WeightDelta:
    mask: WeightMask = neuron_mask(model) if kinds == NEURONS else mask_of(model, kinds)
    delta: WeightDelta = editor.run(model, *facts, mask, text=TEXT, ranks=ranks, **more)
    return delta


def assert_made_together(
    edits: Mapping[str, tuple[Any, tuple[str, ...]]], folder: Path, size: int, logs: Path, **how: bool
) -> None:
    """Several processes make what one makes, to 1e-5 in float32."""
    model = load_model(folder)
    facts = known_facts(model)

    def work() -> int:
        with joined() as ranks:
            own = load_model(folder, **how)
            for name, (editor, kinds) in edits.items():
                delta = edit(own, facts, editor, kinds, ranks)
                if ranks.first:
                    delta.save(logs / f"{name}.safetensors")
        return 0

    children = job(work, size, logs)
    assert [child.wait() for child in children] == [0] * size, [child.said for child in children]
    for name, (editor, kinds) in edits.items():
        alone = edit(model, facts, editor, kinds)
        assert_near(alone, WeightDelta.load(logs / f"{name}.safetensors"), name)


def assert_near(a: WeightDelta, b: WeightDelta, name: str) -> None:
    assert a.norm > 1e-3 and set(a.changes) == set(b.changes), name
    for parameter, change in a.changes.items():
        ours, theirs = torch.zeros(change.selection.shape), torch.zeros(change.selection.shape)
        change.selection.put_(ours, change.new - change.old)
        other = b.changes[parameter]
        other.selection.put_(theirs, other.new - other.old)
        assert (ours - theirs).abs().max() <= 1e-5, (name, parameter)


@pytest.mark.parametrize(
    ("arch", "size", "shard"),
    [("gpt2", 2, True), ("smollm", 2, True), ("gemma2", 4, True), ("smollm", 2, False)],
)
def test_several_processes_make_the_delta_of_one(
    folder_of: Any, arch: str, size: int, shard: bool, tmp_path: Path
) -> None:
    assert_made_together(PLAIN, folder_of(arch), size, tmp_path, shard=shard)


def test_a_sharded_model_may_be_offloaded_checkpointed_cut_short_and_attacked(
    folder_of: Any, tmp_path: Path
) -> None:
    assert_made_together(COMPOSED, folder_of("gpt2"), 2, tmp_path, shard=True, offload=True)


def test_each_process_holds_its_part_of_a_sharded_model_and_a_tied_one_stays_tied(
    folder_of: Any, tmp_path: Path
) -> None:
    model = load_model(folder_of("smollm"))
    total = sum(p.numel() for p in model.module.parameters())

    def work() -> int:
        with joined() as ranks:
            own = load_model(folder_of("smollm"), shard=True)
            held = [local(p) for p in own.module.parameters()]
            tied = own.module.lm_head.weight is own.module.model.embed_tokens.weight
            print(json.dumps([sum(p.numel() for p in held), tied, own.fingerprint]), ranks.size)
        return 0

    children = job(work, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    said = [json.loads(child.said.rpartition(" ")[0]) for child in children]
    assert sum(held for held, _, _ in said) == total and max(held for held, _, _ in said) < 0.52 * total
    assert all(tied and fingerprint == model.fingerprint for _, tied, fingerprint in said)


def test_a_killed_run_goes_on_with_another_number_of_processes(folder_of: Any, tmp_path: Path) -> None:
    """Two sharded processes end after the second step; one goes on, and so do they, to what each does undisturbed."""
    folder, stopped = folder_of("smollm"), tmp_path / "state"
    model = load_model(folder)
    facts, editor = known_facts(model), NPO(training=dataclasses.replace(FEW, steps=4))

    class Killed(Exception):
        pass

    def kill(record: Mapping[str, Any]) -> None:
        if record["step"] == 2:
            raise Killed

    def work() -> int:
        with joined() as ranks:
            own = load_model(folder, shard=True)
            whole = edit(own, facts, editor, KINDS, ranks)
            try:
                edit(own, facts, editor, KINDS, ranks, folder=stopped, log=kill)
            except Killed:
                ranks.meet()
            resumed = edit(own, facts, editor, KINDS, ranks, folder=stopped, resume=True)
            print(same(whole, resumed), resumed.provenance["steps"])
        return 0

    children = job(work, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    assert [child.said for child in children] == ["True 4\n"] * 2
    alone = edit(model, facts, editor, KINDS)
    seen: list[Mapping[str, Any]] = []
    taken_up = edit(model, facts, editor, KINDS, folder=stopped, resume=True, log=seen.append)
    assert_near(alone, taken_up, "one process")
    assert [record["step"] for record in seen] == [1, 2, 3, 4]


def test_a_leak_in_a_part_is_caught_by_the_process_that_holds_it(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("smollm")
    facts = known_facts(load_model(folder))
    honest = Run.take_step

    def leaking(run: Run, state: Any) -> dict[str, Any]:
        if not run.team.ranks.first:
            local(run.model.module.get_parameter("model.layers.1.self_attn.q_proj.weight"))[0, 0] += 1e-3
        return honest(run, state)

    monkeypatch.setattr(Run, "take_step", leaking)

    def work() -> int:
        with joined() as ranks:
            editor = NPO(training=dataclasses.replace(FEW, steps=1))
            try:
                edit(load_model(folder, shard=True), facts, editor, NEURONS, ranks)
            except MaskLeak as leak:
                print("q_proj" in str(leak))
        return 0

    children = job(work, 2, tmp_path)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    assert [child.said for child in children] == ["", "True\n"]


def test_a_sharded_model_needs_a_job(folder_of: Any) -> None:
    with pytest.raises(InputError, match="start with torchrun"):
        load_model(folder_of("smollm"), shard=True)
    with pytest.raises(InputError, match="over processes"):
        load_model(folder_of("smollm"), offload=True)


def _texts(lengths: list[int]) -> list[Encoded]:
    return [Encoded(tuple(range(n)), 1, None, ("x",) * n) for n in lengths]


@pytest.mark.parametrize("in_step", [False, True])
def test_every_example_of_a_step_falls_to_one_process_and_the_tokens_are_even(in_step: bool) -> None:
    encoded, store = _texts([40, 3, 9, 9, 12, 5, 30, 2]), dist.HashStore()
    whole_step = batches(encoded, 24)
    dealt: list[list[Piece]] = [
        Team(Ranks(rank, 3, store), in_step).deal().pieces(encoded, whole_step, 24) for rank in range(3)
    ]
    counted = [[n for piece in own if piece.counts for n in piece.batch.examples] for own in dealt]
    assert sorted(n for own in counted for n in own) == list(range(8))
    tokens = [sum(len(encoded[n].ids) for n in own) for own in counted]
    assert max(tokens) <= 40 and min(tokens) >= 30
    if in_step:  # all run as many batches; the additional ones are short and count for nothing
        assert len({len(own) for own in dealt}) == 1
        assert all(p.batch.examples == (7,) for own in dealt for p in own if not p.counts)
    else:
        assert all(piece.counts for own in dealt for piece in own)


def test_what_comes_next_in_a_step_goes_to_whoever_had_less() -> None:
    facts, texts = _texts([5, 5, 4]), _texts([50])
    counted = []
    for rank in range(2):
        deal = Team(Ranks(rank, 2, dist.HashStore())).deal()
        deal.pieces(facts, batches(facts), 4096)
        counted.append([piece.batch.examples for piece in deal.pieces(texts, batches(texts), 4096)])
    assert counted == [[], [(0,)]]
