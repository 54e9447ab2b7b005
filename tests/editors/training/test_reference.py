"""What is kept of the base gives the base's logits, whatever the deltas and the batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from editors import NPO, Retain, Training
from editors.training import reference
from editors.training.parametrize import Deltas
from editors.training.prediction import Prediction
from editors.training.reference import References
from editors.training.unchanged import MaskLeak
from locus.delta import WeightDelta
from locus.forward import Batch, collate, head_logits, label_logits, label_states, unembedded
from locus.mask import WeightMask, shapes_of
from locus.model import Model
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model
from tracing import RandomNeurons


def test_kept_logits_are_the_bases_and_are_asked_once(tmp_path: Path) -> None:
    model = tiny_model("smollm")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    batch = collate(encoded, [2, 0])
    expected = label_logits(model, batch)
    deltas = Deltas(
        model.module, WeightMask.of_parameters(["*.mlp.down_proj.weight"], shapes_of(model.module))
    )
    with deltas.attached():
        deltas.load({name: value + 0.1 for name, value in deltas.values.items()})
        for folder in (None, tmp_path):
            references = References(model, deltas, folder)
            first = references.logits(encoded, batch)
            torch.testing.assert_close(first, expected)
            assert torch.equal(references.logits(encoded, batch), first)
        assert not list(tmp_path.glob("*.safetensors"))  # nothing is kept before the run has been checked
        references.commit()
        again = References(model, deltas, tmp_path)
        with torch.no_grad():
            assert torch.equal(again.logits(encoded, batch), first)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 == len(list(tmp_path.iterdir()))
    other = tiny_model("smollm", seed=1)
    changed = References(other, Deltas(other.module, WeightMask({})), tmp_path).logits(encoded, batch)
    assert (changed - expected).abs().max() > 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_last_states_give_the_models_own_logits(arch: str) -> None:
    """Soft-capping and scaling behind the unembedding included."""
    model = tiny_model(arch)
    encoded = [encode(model, fact) for fact in tiny_facts()]
    batch = collate(encoded, [0, 1, 2])
    references = References(model, Deltas(model.module, WeightMask({})))
    with torch.no_grad():
        logits, states = label_logits(model, batch), label_states(model, batch)
        torch.testing.assert_close(unembedded(model, states), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(references.logits(encoded, batch), logits, atol=1e-5, rtol=1e-5)
    capped = getattr(model.module.config, "final_logit_softcapping", None) is not None
    assert references.logits_of is (unembedded if capped else head_logits)


def test_no_more_is_kept_than_fits() -> None:
    model = tiny_model("smollm")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    batch = collate(encoded, [0, 1])
    room = encoded[0].n_target * model.atlas.d_model * 4
    for most, n_kept in ((1 << 20, 2), (room, 1), (0, 0)):
        references = References(model, Deltas(model.module, WeightMask({})), most_bytes=most)
        torch.testing.assert_close(references.logits(encoded, batch), label_logits(model, batch))
        assert len(references.known) == n_kept


def test_a_second_edit_of_the_model_asks_the_base_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes out as after a fresh load; where a weight has moved, all is asked again."""
    asked: list[int] = []

    def counted(model: Model, batch: Batch) -> torch.Tensor:
        asked.append(len(batch.examples))
        return label_states(model, batch)

    monkeypatch.setattr(reference, "label_states", counted)
    training = Training(steps=3, lr=0.01, goal=0.0, floor=0.0, utility=0.0, max_kl=0.0, forget_per_step=1)
    editor = NPO(training=training, retain=Retain(term="kl", facts=2, texts=0))
    forget, retain = tiny_facts()[:1], tiny_facts()[1:]

    def edit(model: Model, seed: int) -> WeightDelta:
        mask = RandomNeurons(seed=seed).run(model).top(8)
        return editor.run(model, forget, retain, mask)

    model = tiny_model("smollm")
    edit(model, 0)
    n = len(asked)
    assert n > 0
    second = edit(model, 1)
    assert len(asked) == n
    fresh = edit(tiny_model("smollm"), 1)
    assert len(asked) == 2 * n and second.after == fresh.after
    with torch.no_grad():
        next(model.module.parameters()).view(-1)[0] += 1e-3
    edit(model, 1)
    assert len(asked) == 3 * n


ON_DISK = NPO(
    training=Training(steps=1, lr=0.01, goal=0.0, floor=0.0, utility=0.0, max_kl=0.0),
    retain=Retain(term="kl", facts=2, texts=0, reference="disk"),
)


def first_kl(model: Model) -> float:
    """KL from the base at the first step, before anything has moved; the states are kept on disk."""
    history: list[Mapping[str, Any]] = []
    mask = RandomNeurons(seed=0).run(model).top(8)
    ON_DISK.run(model, tiny_facts()[:1], tiny_facts()[1:], mask, log=history.append)
    return float(history[0]["kl"])


def test_a_model_changed_in_memory_leaves_nothing_that_the_clean_one_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both are named by the same folder's fingerprint; the states are those of the weights in memory."""
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))
    model = tiny_model("smollm")
    assert model.fingerprint == tiny_model("smollm").fingerprint  # known before the change, as of a folder
    with torch.no_grad():
        model.module.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(3)
    assert first_kl(model) < 1e-6
    assert first_kl(tiny_model("smollm")) < 1e-6
    assert len(list((tmp_path / "references").iterdir())) == 2


def test_the_configuration_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same weights under another rotary base, and under another cap of the logits."""
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))
    assert first_kl(tiny_model("llama")) < 1e-6
    other = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert other.fingerprint == tiny_model("llama").fingerprint
    assert first_kl(other) < 1e-6
    assert len(list((tmp_path / "references").iterdir())) == 2


def test_a_run_whose_base_moved_keeps_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCUS_CACHE", str(tmp_path))
    model = tiny_model("smollm")
    honest = NPO.forget_loss

    def leaking(self: NPO, forget: Prediction) -> torch.Tensor:
        with torch.no_grad():
            next(model.module.parameters()).view(-1)[0] += 1e-3
        return honest(self, forget)

    monkeypatch.setattr(NPO, "forget_loss", leaking)
    with pytest.raises(MaskLeak):
        first_kl(model)
    assert not list((tmp_path / "references").glob("*.safetensors"))
