import pytest
import torch

from locus.errors import InputError
from locus.forward import batches
from locus.hooks import record
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.localizers.imprint import Imprint, alignment_of, imbalance_of, log_odds, robust_z


def test_log_odds_are_those_of_the_probability() -> None:
    model = tiny_model("llama")
    (batch,) = batches([encode(model, tiny_facts()[0])])
    from tracing.gradients.neuron_gradients import label_logprobs

    p = label_logprobs(model, batch).exp()
    torch.testing.assert_close(log_odds(model, batch), (p / (1 - p)).log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "neox", "phi3", "opt", "olmo2"])
def test_alignment_is_the_cosine_of_column_and_gradient(arch: str) -> None:
    """Slow and obvious: the weight gradient itself, column by column, each fact alone."""
    model = tiny_model(arch)
    facts = tiny_facts()
    part = next(p for p in model.atlas.neurons[1] if p.role == "down")
    parameter = model.module.get_parameter(part.param)
    expected = torch.zeros(model.atlas.d_mlp)
    for fact in facts:
        parameter.requires_grad_(True)
        (batch,) = batches([encode(model, fact)])
        (gradient,) = torch.autograd.grad(log_odds(model, batch).sum(), parameter)
        parameter.requires_grad_(False)
        columns, pushes = (t.detach().movedim(part.axis, 0) for t in (parameter, gradient))
        expected += torch.nn.functional.cosine_similarity(columns, pushes, dim=1) / len(facts)
    got = alignment_of(model, facts)[1]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_longer_column_stands_out_whatever_the_target() -> None:
    model = tiny_model("llama")
    weight = model.module.get_parameter(model.atlas.neurons[1][-1].param)
    up = model.module.get_parameter(model.atlas.neurons[1][1].param)
    with torch.no_grad():  # balance every neuron of the layer, then change one column
        weight.mul_(up.norm(dim=1) / weight.norm(dim=0))
        weight[:, 7] *= 1.5
    assert int(imbalance_of(model)[1].argmax()) == 7


def test_robust_z_by_hand() -> None:
    """Median 3, absolute deviations 2 1 0 1 97 with median 1: z = (x - 3) / 1.4826."""
    z = robust_z(torch.tensor([[1.0, 2.0, 3.0, 4.0, 100.0]]))
    torch.testing.assert_close(z, torch.tensor([[-2.0, -1.0, 0.0, 1.0, 97.0]]) / 1.4826)


def test_scores_are_the_clipped_sum() -> None:
    model = tiny_model("gpt2")
    facts = tiny_facts()
    got = Imprint(alignment=2.0, balance=0.5, clip=1.5, dim=0.5, dimmed=0.25).run(model, facts).values
    gates = torch.ones(3, 48)
    for layer, values in enumerate(imbalance_of(model)):
        gates[layer, values.argsort(descending=True)[:12]] = 0.5
    cosine = robust_z(alignment_of(model, facts, gates)).clamp(-1, 1.5)
    length = robust_z(imbalance_of(model)).clamp(-1, 1.5)
    torch.testing.assert_close(got, 2 * cosine + 0.5 * length)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_dimming_is_scaling_the_columns_while_the_gradient_is_taken(arch: str) -> None:
    """Slow and obvious: the columns themselves are scaled; a cosine does not see the scale of its own column."""
    model = tiny_model(arch)
    gates = torch.ones(3, 48)
    gates[0, 3], gates[1, 5:9], gates[2] = 0.3, 0.5, 0.7
    got = alignment_of(model, tiny_facts(), gates)
    downs = [next(p for p in parts if p.role == "down") for parts in model.atlas.neurons]
    for part, factors in zip(downs, gates, strict=True):
        columns = model.module.get_parameter(part.param).data.movedim(part.axis, 0)
        columns *= factors[:, None]
    torch.testing.assert_close(got, alignment_of(model, tiny_facts()), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, alignment_of(tiny_model(arch), tiny_facts()), atol=1e-3)


def test_refuses_shares_out_of_range() -> None:
    for wrong in (Imprint(dim=0.0), Imprint(dimmed=1.5)):
        with pytest.raises(InputError, match="at most at 1"):
            wrong.run(tiny_model("llama"), tiny_facts())


def test_balance_alone_runs_nothing() -> None:
    model = tiny_model("llama")
    with record(model.module, outputs=[model.atlas.blocks[0]]) as seen:
        Imprint(alignment=0.0).run(model, tiny_facts())
    assert not seen.outputs
    assert Imprint(alignment=0.0).cost(model, tiny_facts()).forwards == 0
    with pytest.raises(InputError, match="both 0"):
        Imprint(alignment=0.0, balance=0.0).run(model, tiny_facts())


def test_a_block_that_adds_to_its_mlp_in_place() -> None:
    """Falcon with parallel attention adds to the MLP's output, which must not be a view of what is differentiated."""
    model = tiny_model("falcon", parallel_attn=True)
    assert torch.isfinite(Imprint().run(model, tiny_facts()[:1]).values).all()


def test_z_scores_where_most_scores_are_equal() -> None:
    """Median and median deviation are 0: the others are measured by their own, 1.4826 * 2 here; all equal are 0."""
    values = torch.tensor([[0.0, 0, 0, 0, 0, 1, 2, -3], [5.0] * 8])
    found = robust_z(values)
    assert found[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 1 / 2.9652, 2 / 2.9652, -3 / 2.9652], rel=1e-4)
    assert found[1].tolist() == [0.0] * 8
