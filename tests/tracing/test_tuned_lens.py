from pathlib import Path

import pytest
import torch

from locus.errors import InputError
from locus.lens import lens_scores
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.tuned_lens import TunedLens, TunedLensTraining, _states, tuned_scores

TEXT = ["The Eiffel Tower is in Paris and the Colosseum is in Rome.", "Berlin is the capital of Germany."]
QUICK = TunedLensTraining(steps=12, tokens=64, block=32)


def mean_kl(model, lens: TunedLens) -> float:  # type: ignore[no-untyped-def]
    ids = encode(model, tiny_facts()[0]).ids
    states = _states(model, ids)
    last = len(states) - 1
    with torch.no_grad():
        final = lens.logits(model, states[-1], last).log_softmax(-1)
        each = [lens.logits(model, states[layer], layer).log_softmax(-1) for layer in range(last)]
    return sum(float((final.exp() * (final - one)).sum(-1).mean()) for one in each) / last


def test_untrained_it_is_the_logit_lens() -> None:
    model = tiny_model("gemma2")
    encoded = [encode(model, fact) for fact in tiny_facts()]
    tuned, plain = tuned_scores(model, TunedLens.untrained(model), encoded), lens_scores(model, encoded)
    assert torch.equal(tuned.rank, plain.rank) and torch.equal(tuned.bottom_rank, plain.bottom_rank)
    torch.testing.assert_close(tuned.prob, plain.prob, rtol=1e-4, atol=1e-7)


def test_training_brings_the_layers_to_the_last_one() -> None:
    model = tiny_model("llama")
    lens = QUICK.run(model, TEXT)
    assert mean_kl(model, lens) < 0.9 * mean_kl(model, TunedLens.untrained(model))


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = QUICK.run(model, TEXT)

    class Killed(Exception):
        pass

    class Dies(TunedLensTraining):
        def _drawn(self, pieces, step):  # type: ignore[no-untyped-def]
            if step == 9:
                raise Killed
            return super()._drawn(pieces, step)

    with pytest.raises(Killed):
        Dies(steps=12, tokens=64, block=32).run(model, TEXT, folder=tmp_path, save_every=4)
    resumed = QUICK.run(model, TEXT, folder=tmp_path, resume=True)
    assert torch.equal(resumed.matrices, whole.matrices) and torch.equal(resumed.biases, whole.biases)


def test_steps_are_those_of_torch_sgd() -> None:
    ours = [torch.randn(3, 3), torch.randn(3)]
    theirs = [tensor.clone().requires_grad_() for tensor in ours]
    optimizer = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    momenta = [torch.zeros_like(tensor) for tensor in ours]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape, generator=generator)
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        QUICK._descend(ours, momenta, 0.1)
        torch.nn.utils.clip_grad_norm_(theirs, QUICK.clip)
        optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach())


def test_long_gradients_are_clipped_together() -> None:
    """Lengths 3000 and 4000 count as 0.6 and 0.8: Nesterov's first step is rate * (1 + momentum) of them."""
    parameters = [torch.zeros(1, 4, 4, requires_grad=True), torch.zeros(1, 4, requires_grad=True)]
    for parameter, length in zip(parameters, (3000.0, 4000.0), strict=True):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.view(-1)[0] = length
    TunedLensTraining()._descend(parameters, [torch.zeros_like(p) for p in parameters], 0.1)
    moved = [-float(p.detach().view(-1)[0]) for p in parameters]
    assert moved == pytest.approx([0.1 * 1.9 * 0.6, 0.1 * 1.9 * 0.8])


def test_refuses_another_model(tmp_path: Path) -> None:
    lens = TunedLens.untrained(tiny_model("llama", seed=0))
    lens.save(tmp_path / "lens.safetensors")
    back = TunedLens.load(tmp_path / "lens.safetensors")
    other = tiny_model("llama", seed=1)
    with pytest.raises(InputError, match="another model"):
        tuned_scores(other, back, [encode(other, tiny_facts()[0])])
    with pytest.raises(InputError, match="no text"):
        QUICK.run(other, [])
