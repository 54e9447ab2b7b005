"""A trained edit's `--seed` gives another edit, or the objective declares itself deterministic."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from editors import EDITORS, OBJECTIVES
from locus.cli.methods import is_deterministic
from locus.cli.options import method_settings
from locus.delta import WeightDelta
from locus.mask import WeightMask, shapes_of
from tests.tiny import tiny_facts, tiny_model

TRAINED = (*OBJECTIVES, "whp", "task-vector")
QUICK = (
    "--steps", "3", "--lr", "0.01", "--forget-per-step", "1", "--floor", "0", "--goal", "0", "--utility", "0",
    "--max-kl", "0",
)  # fmt: skip
"""One of two forget facts a step, so that which one is drawn."""
OWN: dict[str, tuple[str, ...]] = {
    "whp": ("--reinforce-steps", "2", "--reinforce-forget-per-step", "1"),
    "task-vector": ("--min-steps", "3"),
    "selective-ga": ("--threshold", "-1"),  # of a random model no target is memorized
    "satimp": ("--beta1", "0"),  # nor likely
    "head-projection": ("--k", "150"),  # nor among the first
    "rmu": ("--layer", "1"),  # the mask's
}
"""What lets an objective push a random model."""


def trained(name: str, seed: int, *options: str) -> WeightDelta:
    """The edit of a command line with `--seed`."""
    model = tiny_model("smollm")
    mask = WeightMask.of_parameters(["*.1.mlp.down_proj.weight"], shapes_of(model.module))
    facts = [dataclasses.replace(fact, held_out=False) for fact in tiny_facts()]
    editor: Any = method_settings(name, EDITORS[name], (*QUICK, *OWN.get(name, ()), *options), {"seed": seed})
    delta: WeightDelta = editor.run(model, facts[:2], facts[2:], mask)
    return delta


def same(one: WeightDelta, other: WeightDelta) -> bool:
    return one.changes.keys() == other.changes.keys() and all(
        torch.equal(change.new, other.changes[name].new) for name, change in one.changes.items()
    )


@pytest.mark.parametrize("name", TRAINED)
def test_another_seed_is_another_edit_or_the_objective_says_so(name: str) -> None:
    first = trained(name, 0)
    assert first.n_changed and same(first, trained(name, 0))
    others = [trained(name, seed) for seed in (1, 2)]
    assert all(same(first, other) for other in others) == is_deterministic(EDITORS[name])


def test_the_first_stage_of_whp_draws_by_the_seed_too() -> None:
    """The reinforced model is another one, whatever the second stage draws."""
    one, other = (
        method_settings("whp", EDITORS["whp"], (), {"seed": seed}).reinforce.seed  # type: ignore[attr-defined]
        for seed in (0, 1)
    )
    assert (one, other) == (0, 1)


def test_every_editor_has_a_seed_test() -> None:
    from tests.contracts.test_seeds import DIRECT

    assert set(TRAINED) | set(DIRECT) == set(EDITORS) and not set(TRAINED) & set(DIRECT)
