"""Second moments: equal to a plain sum, whatever the batches, and kept on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editors.key_value import second_moments as statistics
from editors.key_value.second_moments import mean_keys, second_moments
from locus.errors import InputError
from locus.hooks import record
from locus.tokens import encode_text
from tests.tiny import tiny_model

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
