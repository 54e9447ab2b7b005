import pytest
import torch
from torch import Tensor

from locus.errors import InputError
from locus.hooks import patched, record
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.localizers.indirect_effect import TracedNeurons, prepare_all
from tracing.patching.corruption import Corrupter
from tracing.patching.plain_engine import logits_of
from tracing.patching.readout import Readout
from tracing.patching.runs import Inputs


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_is_the_slope_of_restoring_one_neuron(arch: str) -> None:
    """Move one neuron a little from its corrupted towards its clean activation, at all positions, by a hook."""
    model = tiny_model(arch)
    facts = tiny_facts()
    scores = TracedNeurons(samples=2).run(model, facts).values
    layer, neuron, step = 1, 7, 1e-2
    name = model.atlas.neuron_in[layer]
    prepared = prepare_all(model, facts, 0)
    corrupter = Corrupter.of(model, prepared, "gaussian", 3.0)
    slopes = []
    for one in prepared:
        corrupted = corrupter.inputs(model, one, 2)
        readout = Readout("logprob", torch.tensor(one.encoded.target_ids))
        with torch.no_grad(), record(model.module, inputs=[name]) as clean:
            logits_of(model, Inputs(one.ids), one.reads, 1)
        with torch.no_grad(), record(model.module, inputs=[name]) as other:
            logits_of(model, corrupted, one.reads, 2)
        change = torch.zeros_like(other.inputs[name])
        change[..., neuron] = (clean.inputs[name] - other.inputs[name])[..., neuron]

        def value(amount: float, one=one, corrupted=corrupted, change=change, readout=readout) -> Tensor:  # type: ignore[no-untyped-def]
            with torch.no_grad(), patched(model.module, inputs={name: lambda h: h + amount * change}):
                return readout(logits_of(model, corrupted, one.reads, 2))[:, 0].mean()

        slopes.append((value(step) - value(-step)) / (2 * step))
    expected = float(torch.stack(slopes).mean())
    assert float(scores[layer, neuron]) == pytest.approx(expected, rel=2e-2, abs=2e-4)


def test_draws_follow_the_seed_and_batches_do_not_matter() -> None:
    model = tiny_model("gpt2")
    facts = tiny_facts()
    first = TracedNeurons(samples=3).run(model, facts).values
    pieces = TracedNeurons(samples=3).run(model, facts, batch_tokens=1).values
    torch.testing.assert_close(first, pieces, rtol=1e-3, atol=1e-6)
    assert not torch.equal(first, TracedNeurons(samples=3, seed=1).run(model, facts).values)


def test_tokens_have_no_subject() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="give facts"):
        TracedNeurons().run(model, [encode(model, tiny_facts()[0])])
