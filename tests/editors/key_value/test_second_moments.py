"""Second moments: equal to a plain sum, whatever the batches, and kept on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from editors.key_value import second_moments as statistics
from editors.key_value.second_moments import key_sources, mean_keys, second_moments
from locus.errors import InputError
from locus.hooks import record
from locus.model import load_model
from locus.tokens import encode_text
from tests.tiny import save_tiny, tiny_model

TEXT = (
    "The city of Rome is in Italy and the Colosseum is in the city of Rome.",
    "Berlin is the capital of Germany.",
    "What language does François Truffaut speak? French, not English.",
)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "neox", "gemma2", "opt"])
def test_equals_a_sum_over_texts_one_by_one(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    got = second_moments(model, [0, 2], TEXT, batch_tokens=64, folder=tmp_path)
    for layer in (0, 2):
        total, n = torch.zeros(48, 48, dtype=torch.float64), 0
        site = model.atlas.neuron_in[layer]
        for block in (b for text in TEXT for b in encode_text(model, text)):
            with torch.no_grad(), record(model.module, inputs=[site]) as seen:
                model.module(torch.tensor([block.ids]))
            keys = seen.inputs[site][0].double()
            total, n = total + keys.T @ keys, n + len(keys)
        assert got[layer].n_tokens == n
        torch.testing.assert_close(got[layer].total, total, rtol=1e-3, atol=1e-3)  # float32 forwards


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_means_leave_the_first_token_of_a_text_out(batch_tokens: int) -> None:
    model = tiny_model("gpt2")
    got = mean_keys(model, [1], TEXT, batch_tokens)[1]
    site, seen_keys = model.atlas.neuron_in[1], []
    for text in TEXT:
        (block,) = encode_text(model, text)
        with torch.no_grad(), record(model.module, inputs=[site]) as seen:
            model.module(torch.tensor([block.ids]))
        seen_keys.append(seen.inputs[site][0, 1:].double())
    torch.testing.assert_close(got, torch.cat(seen_keys).mean(0), rtol=1e-4, atol=1e-5)


def test_is_read_back_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    first = second_moments(model, [1], TEXT, folder=tmp_path)[1]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(statistics, "_keys", lambda *_, **__: pytest.fail("ran again"))
    again = second_moments(model, [1], TEXT, folder=tmp_path)[1]
    assert torch.equal(first.total, again.total)
    assert first.n_tokens == again.n_tokens


def test_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    whole = second_moments(model, [0, 1], TEXT, batch_tokens=1, folder=tmp_path / "whole")
    real, calls = statistics._keys, []

    def stops_at_the_third(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(statistics, "_keys", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        second_moments(model, [1], TEXT, batch_tokens=1, folder=tmp_path / "cut")
    monkeypatch.setattr(statistics, "_keys", real)
    resumed = second_moments(model, [0, 1], TEXT, batch_tokens=1, folder=tmp_path / "cut")
    for layer in (0, 1):
        assert torch.equal(resumed[layer].total, whole[layer].total)
        assert resumed[layer].n_tokens == whole[layer].n_tokens


def test_another_model_text_or_length_is_another_file(tmp_path: Path) -> None:
    second_moments(tiny_model(), [1], TEXT, folder=tmp_path)
    second_moments(tiny_model(seed=1), [1], TEXT, folder=tmp_path)
    second_moments(tiny_model(), [1], TEXT[:2], folder=tmp_path)
    assert 15 < second_moments(tiny_model(), [1], TEXT, n_tokens=20, folder=tmp_path)[1].n_tokens <= 20
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_an_edit_in_memory_never_reaches_the_clean_model(tmp_path: Path) -> None:
    """What was computed from an edited model is kept apart: a clean model gives the same with and without it."""
    clean, edited = tiny_model(), tiny_model()
    right = second_moments(clean, [1], TEXT, folder=tmp_path / "clean")[1].total
    edited.fingerprint  # noqa: B018  # known before the edit, as in a session that measures first
    part = next(part for part in edited.atlas.neurons[0] if part.role == "down")
    with torch.no_grad():
        edited.module.get_parameter(part.param).mul_(1.5)
    other = second_moments(edited, [1], TEXT, folder=tmp_path / "shared")[1].total
    assert not torch.allclose(other, right)
    assert torch.equal(second_moments(clean, [1], TEXT, folder=tmp_path / "shared")[1].total, right)
    assert torch.equal(second_moments(edited, [1], TEXT, folder=tmp_path / "shared")[1].total, other)


def test_an_edit_that_the_keys_do_not_see_keeps_the_file(tmp_path: Path) -> None:
    """The layer's own down projection, later layers and the unembedding do not change what the layer reads."""
    model = tiny_model()
    before = key_sources(model, [1])
    with torch.no_grad():
        for layer in (1, 2):
            part = next(part for part in model.atlas.neurons[layer] if part.role == "down")
            model.module.get_parameter(part.param).mul_(1.5)
        model.module.get_submodule(model.atlas.unembed).weight.mul_(1.5)  # type: ignore[operator]
        assert key_sources(model, [1]) == before
        up = next(part for part in model.atlas.neurons[1] if part.role == "up")
        model.module.get_parameter(up.param)[0, 0] += 1.0
    assert key_sources(model, [1]) != before


def test_the_configuration_is_part_of_the_key(tmp_path: Path) -> None:
    """Two folders of the same weights that rotate by other angles read other keys."""
    models = []
    for theta in (10_000.0, 20.0):
        save_tiny(tiny_model(), tmp_path / f"{theta}")
        file = tmp_path / f"{theta}" / "config.json"
        config = json.loads(file.read_text("utf-8"))
        config["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        config["rope_theta"] = theta
        file.write_text(json.dumps(config), "utf-8")
        models.append(load_model(file.parent, dtype="float32"))
    one, other = models
    assert one.fingerprint == other.fingerprint
    cached = tmp_path / "statistics"
    first = second_moments(one, [1], TEXT, folder=cached)[1].total
    second = second_moments(other, [1], TEXT, folder=cached)[1].total
    assert not torch.allclose(first, second)
    alone = second_moments(other, [1], TEXT, folder=tmp_path / "alone")[1].total
    assert torch.equal(second, alone)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    second_moments(tiny_model(), [1], TEXT, folder=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError):
        second_moments(tiny_model(), [1], TEXT, folder=tmp_path)


def test_is_never_the_identity(tmp_path: Path) -> None:
    moment = second_moments(tiny_model(), [1], TEXT, folder=tmp_path)[1].mean
    off_diagonal = moment - moment.diagonal().diag()
    assert float(off_diagonal.abs().max()) > 1e-3
