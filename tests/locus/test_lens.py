import pytest
import torch

from locus.fact import Example
from locus.hooks import record
from locus.lens import lens_logits, lens_scores
from locus.tokens import encode
from tests.tiny import ARCHITECTURES, tiny_model

FACTS = [Example("The capital of France is", " Paris"), Example("Rome", " is the capital of Italy")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_the_last_layer_the_lens_is_the_model(arch: str) -> None:
    model = tiny_model(arch)
    ids = torch.tensor([encode(model, FACTS[0]).ids])
    last = model.atlas.blocks[-1]
    with torch.no_grad(), record(model.module, outputs=[last]) as seen:
        logits = model.module(ids).logits
        torch.testing.assert_close(lens_logits(model, seen.outputs[last]), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_scores_equal_one_example_at_a_time(arch: str) -> None:
    model = tiny_model(arch)
    encoded = [encode(model, fact) for fact in FACTS]
    scores = lens_scores(model, encoded)
    for i, one in enumerate(encoded):
        with torch.no_grad(), record(model.module, outputs=model.atlas.blocks) as seen:
            model.module(torch.tensor([one.prompt_ids]))
        target = one.target_ids[0]
        for layer, block in enumerate(model.atlas.blocks):
            with torch.no_grad():
                logits = lens_logits(model, seen.outputs[block][0, -1])
            order = logits.argsort(descending=True).tolist()
            assert scores.rank[i, layer] == order.index(target)
            assert scores.bottom_rank[i, layer] == len(order) - 1 - order.index(target)
            assert float(scores.prob[i, layer]) == pytest.approx(float(logits.softmax(-1)[target]), rel=1e-3)
