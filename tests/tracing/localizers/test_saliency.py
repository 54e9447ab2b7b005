import pytest
import torch
from torch import Tensor

from locus.errors import InputError
from locus.fact import Example
from locus.hooks import patched
from locus.model import Model
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_model
from tracing.localizers.saliency import ActivationGradient, GradientSaliency

FACTS = [
    Example("The capital of France is", " Paris"),
    Example("Rome", " is the capital of Italy"),
    Example("The river that runs through London is the", " Thames"),
]
RETAIN = [Example("The capital of Spain is", " Madrid"), Example("The moon is", " round")]


def logprob(model: Model, example: Example) -> Tensor:
    """Slow and obvious: one example alone, all logits, the target's tokens picked out."""
    encoded = encode(model, example)
    ids = torch.tensor([encoded.ids])
    logits = model.module(ids).logits[0].double().log_softmax(-1)
    positions = range(encoded.target_start, len(encoded.ids))
    return torch.stack([logits[t - 1, encoded.ids[t]] for t in positions]).sum()


def weight_times_gradient(model: Model, examples: list[Example], role: str) -> Tensor:
    """Per neuron, mean over examples of weight * d log p / d weight summed over one role."""
    roles = {role, f"{role}_bias"} if role != "down" else {role}
    parameters = dict(model.module.named_parameters())
    wanted = [(layer, part) for layer, parts in enumerate(model.atlas.neurons) for part in parts]
    wanted = [(layer, part) for layer, part in wanted if part.role in roles]
    total = torch.zeros(model.atlas.n_layers, model.atlas.d_mlp)
    for _, part in wanted:
        parameters[part.param].requires_grad_(True)
    for example in examples:
        logprob(model, example).backward()
    for layer, part in wanted:
        product = parameters[part.param].detach() * parameters[part.param].grad
        product = product.movedim(part.axis, 0)[part.offset : part.offset + model.atlas.d_mlp]
        total[layer] += product.flatten(1).sum(1) if product.dim() > 1 else product
    for _, part in wanted:
        parameters[part.param].requires_grad_(False).grad = None
    return total / len(examples)


def roles_of(model: Model) -> set[str]:
    return {part.role for part in model.atlas.neurons[0]}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_weight_times_gradient_of_the_down_column(arch: str) -> None:
    model = tiny_model(arch)
    scores = GradientSaliency(absolute="never").run(model, FACTS).values
    torch.testing.assert_close(scores, weight_times_gradient(model, FACTS, "down"), atol=1e-6, rtol=1e-4)
    assert scores.abs().max() > 1e-4


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma2"])
def test_equals_weight_times_gradient_of_the_up_row_where_the_mlp_is_gated(arch: str) -> None:
    model = tiny_model(arch)
    assert "gate" in roles_of(model)
    scores = GradientSaliency(absolute="never").run(model, FACTS).values
    torch.testing.assert_close(scores, weight_times_gradient(model, FACTS, "up"), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("arch", ["qwen3", "gpt2", "neox"])
def test_is_the_slope_of_scaling_one_neuron(arch: str) -> None:
    model = tiny_model(arch)
    model.module.double()
    layer, neuron, step = 1, 3, 1e-4

    def value(scale: float) -> float:
        def patch(h: Tensor) -> Tensor:
            scales = torch.ones(h.shape[-1], dtype=h.dtype)
            scales[neuron] = scale
            return h * scales

        with torch.no_grad(), patched(model.module, inputs={model.atlas.neuron_in[layer]: patch}):
            return float(sum(logprob(model, fact) for fact in FACTS)) / len(FACTS)

    slope = (value(1 + step) - value(1 - step)) / (2 * step)
    score = GradientSaliency(absolute="never").run(model, FACTS).values[layer, neuron]
    assert float(score) == pytest.approx(slope, rel=2e-2, abs=1e-5)


@pytest.mark.parametrize("absolute", ["end", "example", "position", "never"])
def test_batching_and_padding_change_nothing(absolute: str) -> None:
    model = tiny_model("llama")
    localizer = GradientSaliency(absolute=absolute)
    together = localizer.run(model, FACTS).values
    alone = localizer.run(model, FACTS, batch_tokens=1).values
    torch.testing.assert_close(together, alone, atol=1e-7, rtol=1e-4)


def test_the_later_the_absolute_value_the_smaller_the_score() -> None:
    model = tiny_model("mistral")
    by_order = {
        order: GradientSaliency(absolute=order).run(model, FACTS).values
        for order in ("never", "end", "example", "position")
    }
    torch.testing.assert_close(by_order["end"], by_order["never"].abs())
    tolerance = 1e-7
    assert (by_order["end"] <= by_order["example"] + tolerance).all()
    assert (by_order["example"] <= by_order["position"] + tolerance).all()
    assert (by_order["example"] < by_order["position"] - 1e-6).any()


def test_contrasts_are_the_stated_combinations() -> None:
    model = tiny_model("gpt2")
    forget = GradientSaliency().run(model, FACTS).values
    retain = GradientSaliency().run(model, RETAIN).values
    difference = GradientSaliency(contrast="difference", strength=0.5).run(model, FACTS, RETAIN).values
    ratio = GradientSaliency(contrast="ratio").run(model, FACTS, RETAIN).values
    torch.testing.assert_close(difference, forget - 0.5 * retain)
    torch.testing.assert_close(ratio, forget / (retain + 1e-3 * retain.mean()))


def test_activation_gradient_looks_only_where_the_target_is_predicted() -> None:
    """With one target token only the prompt's last position counts: all others are blocked here by hand."""
    model = tiny_model("llama")
    fact = Example("The capital of France is", " Paris")
    encoded = encode(model, fact)
    assert encoded.n_target >= 1
    scores = ActivationGradient(absolute="never").run(model, [fact]).values
    kept: dict[int, Tensor] = {}

    def hold(layer: int):
        def patch(h: Tensor) -> Tensor:
            kept[layer] = h.detach().requires_grad_() if layer == 0 else h
            return kept[layer]

        return patch

    inputs = {name: hold(layer) for layer, name in enumerate(model.atlas.neuron_in)}
    with patched(model.module, inputs=inputs):
        value = logprob(model, fact)
    gradients = torch.autograd.grad(value, list(kept.values()))
    where = slice(encoded.target_start - 1, len(encoded.ids) - 1)
    expected = torch.stack([(kept[i] * g)[0, where].sum(0) for i, g in enumerate(gradients)])
    torch.testing.assert_close(scores, expected.detach().float(), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_bfloat16_gives_nearly_the_same_scores(arch: str) -> None:
    model = tiny_model(arch)
    exact = GradientSaliency(absolute="never").run(model, FACTS).values
    model.module.bfloat16()
    coarse = GradientSaliency(absolute="never").run(model, FACTS).values
    assert coarse.dtype == torch.float32
    agreement = torch.nn.functional.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0)
    assert agreement > 0.99


def test_leaves_the_weights_without_gradients() -> None:
    model = tiny_model("opt")
    GradientSaliency().run(model, FACTS)
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


def test_refuses_what_it_cannot_do() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="no facts given"):
        GradientSaliency().run(model, [])
    with pytest.raises(InputError, match="retain set and none was given"):
        GradientSaliency(contrast="difference").run(model, FACTS)


def test_cost_counts_both_sets_only_when_both_are_used() -> None:
    model = tiny_model("llama")
    assert GradientSaliency().cost(model, FACTS, RETAIN).forwards == 3
    assert GradientSaliency(contrast="ratio").cost(model, FACTS, RETAIN).backwards == 5
