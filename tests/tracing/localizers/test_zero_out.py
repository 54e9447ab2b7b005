import pytest
import torch

from locus.errors import InputError
from locus.forward import measure
from locus.hooks import patched
from tests.tiny import ARCHITECTURES, tiny_facts, tiny_model
from tracing.localizers.saliency import GradientSaliency
from tracing.localizers.zero_out import ZeroOut


def slow_drop(model, facts, layer: int, neuron: int) -> float:  # type: ignore[no-untyped-def]
    """Silence one neuron with a hook and run everything again."""

    def silence(h: torch.Tensor) -> torch.Tensor:
        keep = torch.ones(h.shape[-1])
        keep[neuron] = 0
        return h * keep

    with patched(model.module, inputs={model.atlas.neuron_in[layer]: silence}):
        without = measure(model, facts).nll
    return float((without - measure(model, facts).nll).mean())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_candidates_get_the_exact_effect(arch: str) -> None:
    model = tiny_model(arch)
    facts = tiny_facts()
    result = ZeroOut(candidates=0.05).run(model, facts)
    slope = GradientSaliency(absolute="never").run(model, facts).values
    for index in slope.flatten().topk(7).indices.tolist()[::3]:
        layer, neuron = divmod(index, model.atlas.d_mlp)
        expected = slow_drop(model, facts, layer, neuron)
        assert float(result.values[layer, neuron]) == pytest.approx(expected, abs=2e-5)


def test_the_rest_keeps_its_order_below_the_candidates() -> None:
    model = tiny_model("llama")
    facts = tiny_facts()
    values = ZeroOut(candidates=0.05).run(model, facts).values.flatten()
    slope = GradientSaliency(absolute="never").run(model, facts).values.flatten()
    candidates = slope.topk(7).indices
    rest = torch.ones(len(values), dtype=torch.bool)
    rest[candidates] = False
    assert values[rest].max() < values[candidates].min()
    assert torch.equal(values[rest].argsort(), slope[rest].argsort())


def test_refuses_no_candidates() -> None:
    with pytest.raises(InputError, match="candidates 0"):
        ZeroOut(candidates=0.0).run(tiny_model("llama"), tiny_facts())
