"""Several processes, one edit: the delta of one process, whether each holds the model or a part of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from editors import NPO, OBJECTIVES, RMU
from editors.training.finetune import Run
from editors.training.latent_adversary import LatentAttack
from editors.training.processes import BatchShare, Processes
from editors.training.settings import Training
from editors.training.unchanged import MaskLeak
from locus.delta import WeightDelta
from locus.errors import InputError
from locus.forward import batches
from locus.mask import WeightMask
from locus.model import Model, load_model
from locus.parallel.ranks import ALONE, Ranks, joined
from locus.parallel.sharding import to_local
from locus.tokens import Encoded
from tests.contracts.test_mask_contract import KINDS, mask_of
from tests.editors.training.test_finetune import TEXT, known_facts, neuron_mask, same
from tests.tiny import save_tiny, tiny_model
from tests.together.forked import job

FEW = Training(steps=2, lr=0.05, optimizer="sgd", momentum=0.9, save_every=1, goal=0.0, forget_per_step=3)
SHORT = dataclasses.replace(FEW, steps=1)
NEURONS, ONE = ("neurons",), ("one neuron",)
Edits = Mapping[str, tuple[Any, tuple[str, ...]]]
EVERY_KIND: Edits = {"every kind of mask": (NPO(training=FEW), KINDS)}
NEURONS_OF_ADAM: Edits = {
    "neurons by AdamW": (NPO(training=Training(steps=2, goal=0.0)), NEURONS),
    "fewer rows than processes": (NPO(training=Training(steps=1, goal=0.0)), ONE),
}
COMPOSED: Edits = {
    "checkpointing": (NPO(training=dataclasses.replace(SHORT, checkpointing=True)), KINDS),
    "a forward cut short": (RMU(layer=2, training=SHORT), KINDS),
    "the lens": (OBJECTIVES["head-projection"](training=SHORT), NEURONS),
    "an adversary": (NPO(training=dataclasses.replace(SHORT, attack=LatentAttack(steps=1))), NEURONS),
    "a floor": (NPO(training=dataclasses.replace(SHORT, floor=0.2)), NEURONS),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of an architecture's tiny model."""
    place = tmp_path_factory.mktemp("processes")

    def folder(arch: str) -> Path:
        if not (place / arch).exists():
            save_tiny(tiny_model(arch, **SMALLER[arch]), place / arch)
        return place / arch

    return folder


SMALLER: dict[str, dict[str, int]] = {
    "gpt2": {},
    "smollm": {"num_hidden_layers": 2},
    "gemma2": {"num_hidden_layers": 2},
}


def edit(
    model: Model, facts: Any, editor: Any, kinds: tuple[str, ...], ranks: Ranks = ALONE, **more: Any
) -> WeightDelta:
    delta: WeightDelta = editor.run(model, *facts, mask_for(model, kinds), text=TEXT, ranks=ranks, **more)
    return delta


def mask_for(model: Model, kinds: tuple[str, ...]) -> WeightMask:
    if kinds == NEURONS:
        return neuron_mask(model)
    if kinds == ONE:
        chosen = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp, dtype=torch.bool)
        chosen[1, 5] = True
        return WeightMask.of_neurons(model.atlas, chosen, fingerprint=model.fingerprint)
    return mask_of(model, kinds)


def made_together(
    edits: Edits,
    folder: Path,
    size: int,
    logs: Path,
    then: Callable[[Model, Any, Ranks], dict[str, Any]] = lambda *_: {},
    **how: bool,
) -> list[dict[str, Any]]:
    """Several processes make the deltas that one makes, to 1e-5 in float32; what each of them says `then`."""
    model = load_model(folder)
    facts = known_facts(model)

    def work() -> int:
        with joined() as ranks:
            own = load_model(folder, **how)
            for name, (editor, kinds) in edits.items():
                delta = edit(own, facts, editor, kinds, ranks)
                if ranks.first:
                    delta.save(logs / f"{name}.safetensors")
            print(json.dumps(then(own, facts, ranks)))
        return 0

    children = job(work, size, logs)
    assert [child.wait() for child in children] == [0] * size, [child.said for child in children]
    for name, (editor, kinds) in edits.items():
        alone = edit(model, facts, editor, kinds)
        assert_near(alone, WeightDelta.load(logs / f"{name}.safetensors"), name)
    return [json.loads(child.said.splitlines()[-1]) for child in children]


def assert_near(a: WeightDelta, b: WeightDelta, name: str) -> None:
    assert a.norm > 1e-3 and set(a.changes) == set(b.changes), name
    for parameter, change in a.changes.items():
        ours, theirs = torch.zeros(change.selection.shape), torch.zeros(change.selection.shape)
        change.selection.put_(ours, change.new - change.old)
        other = b.changes[parameter]
        other.selection.put_(theirs, other.new - other.old)
        assert (ours - theirs).abs().max() <= 1e-5, (name, parameter)


def test_processes_that_hold_the_whole_model_make_the_delta_of_one(folder_of: Any, tmp_path: Path) -> None:
    made_together(EVERY_KIND | NEURONS_OF_ADAM, folder_of("smollm"), 2, tmp_path)


def test_four_processes_that_hold_a_part_each_do_too(folder_of: Any, tmp_path: Path) -> None:
    short = {"every kind of mask": (NPO(training=SHORT), KINDS)}
    made_together(short, folder_of("gemma2"), 4, tmp_path, shard=True)


def test_a_sharded_model_may_be_offloaded_checkpointed_cut_short_and_attacked(
    folder_of: Any, tmp_path: Path
) -> None:
    edits = EVERY_KIND | NEURONS_OF_ADAM | COMPOSED
    made_together(edits, folder_of("gpt2"), 2, tmp_path, shard=True, offload=True)


def test_a_part_each_of_a_tied_model_a_kill_and_a_leak(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that hold a part each make the delta of one; killed, they go on to the same bits, and one process
    goes on from there as well; a bit that moves in one's part is found by that one."""
    folder, stopped, honest = folder_of("smollm"), tmp_path / "state", Run.take_step
    editor = NPO(training=dataclasses.replace(FEW, steps=3))
    lose, leak = False, False

    def take_step(run: Run, state: Any) -> dict[str, Any]:
        if lose and state.step == 2:
            raise KeyboardInterrupt
        if leak and not run.processes.ranks.first:
            to_local(run.model.module.get_parameter("model.layers.1.self_attn.q_proj.weight"))[0, 0] += 1e-3
        return honest(run, state)

    monkeypatch.setattr(Run, "take_step", take_step)

    def then(own: Model, facts: Any, ranks: Ranks) -> dict[str, Any]:
        nonlocal lose, leak
        held = sum(to_local(p).numel() for p in own.module.parameters())
        tied = own.module.lm_head.weight is own.module.model.embed_tokens.weight
        whole = edit(own, facts, editor, KINDS, ranks)
        lose = True
        with contextlib.suppress(KeyboardInterrupt):
            edit(own, facts, editor, KINDS, ranks, folder=stopped)
        lose = False
        ranks.barrier()
        if ranks.first:
            shutil.copy(stopped / "state.safetensors", tmp_path / "killed.safetensors")
        resumed = edit(own, facts, editor, KINDS, ranks, folder=stopped, resume=True)
        leak, caught = True, ""
        try:
            edit(own, facts, NPO(training=SHORT), NEURONS, ranks)
        except MaskLeak as error:
            caught = str(error)
        return {"held": held, "tied": tied, "same": same(whole, resumed), "caught": caught}

    first, second = made_together(EVERY_KIND, folder, 2, tmp_path, then, shard=True)
    model = load_model(folder)
    total = sum(p.numel() for p in model.module.parameters())
    assert first["held"] + second["held"] == total and abs(first["held"] - second["held"]) < 0.05 * total
    assert all(one["tied"] and one["same"] for one in (first, second))
    assert first["caught"] == "" and "q_proj" in second["caught"]
    shutil.copy(tmp_path / "killed.safetensors", stopped / "state.safetensors")
    facts = known_facts(model)
    taken_up = edit(model, facts, editor, KINDS, folder=stopped, resume=True)
    assert_near(edit(model, facts, editor, KINDS), taken_up, "one process")


def test_a_sharded_model_needs_a_job(folder_of: Any) -> None:
    with pytest.raises(InputError, match="start with torchrun"):
        load_model(folder_of("smollm"), shard=True)
    with pytest.raises(InputError, match="over processes"):
        load_model(folder_of("smollm"), offload=True)


def _texts(lengths: list[int]) -> list[Encoded]:
    return [Encoded(tuple(range(n)), 1, None, ("x",) * n) for n in lengths]


@pytest.mark.parametrize("sharded", [False, True])
def test_every_example_of_a_step_falls_to_one_process_and_the_tokens_are_even(sharded: bool) -> None:
    encoded, store = _texts([40, 3, 9, 9, 12, 5, 30, 2]), dist.HashStore()
    whole_step = batches(encoded, 24)
    dealt: list[list[BatchShare]] = [
        Processes(Ranks(rank, 3, store), sharded).split().pieces(encoded, whole_step, 24) for rank in range(3)
    ]
    counted = [[n for piece in own if piece.counts for n in piece.batch.examples] for own in dealt]
    assert sorted(n for own in counted for n in own) == list(range(8))
    tokens = [sum(len(encoded[n].ids) for n in own) for own in counted]
    assert max(tokens) <= 40 and min(tokens) >= 30
    if sharded:  # all run as many batches; the additional ones are short and count for nothing
        assert len({len(own) for own in dealt}) == 1
        assert all(p.batch.examples == (7,) for own in dealt for p in own if not p.counts)
    else:
        assert all(piece.counts for own in dealt for piece in own)


def test_what_comes_next_in_a_step_goes_to_whoever_had_less() -> None:
    facts, texts = _texts([5, 5, 4]), _texts([50])
    counted = []
    for rank in range(2):
        split = Processes(Ranks(rank, 2, dist.HashStore())).split()
        split.pieces(facts, batches(facts), 4096)
        counted.append([piece.batch.examples for piece in split.pieces(texts, batches(texts), 4096)])
    assert counted == [[], [(0,)]]
