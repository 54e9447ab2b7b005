"""What is kept of the base gives the base's logits, whatever the deltas and the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editors.parametrize import Deltas
from editors.reference import References
from locus.forward import collate, head_logits, label_logits, label_states, unembedded
from locus.mask import WeightMask, shapes_of
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model


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
        again = References(model, deltas, tmp_path)
        with torch.no_grad():
            assert torch.equal(again.logits(encoded, batch), first)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
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
