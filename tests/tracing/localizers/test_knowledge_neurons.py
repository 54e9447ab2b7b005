import dataclasses

import pytest
import torch

from locus.errors import InputError
from locus.fact import Fact
from locus.tokens import encode
from tests.tiny import tiny_facts, tiny_model
from tracing.gradients.integrated_gradients import integrated_gradients
from tracing.localizers.depn import PrivacyNeurons
from tracing.localizers.knowledge_neurons import KnowledgeNeurons, share_of_coarse


def test_coarse_sets_of_hand_made_attributions() -> None:
    """Largest 1 and 10: thresholds .2 and 2. Neuron 0 is in both, 1 in the first only, 2 in none, 3 never (< 0)."""
    first = torch.tensor([[1.0, 0.2, 0.1, -5.0]])
    second = torch.tensor([[10.0, 1.9, 1.0, -9.0]])
    assert share_of_coarse([first, second], 0.2).tolist() == [[1.0, 0.5, 0.0, 0.0]]


def test_attributions_without_a_positive_one_have_no_coarse_set() -> None:
    assert not share_of_coarse([torch.tensor([[-1.0, 0.0]])], 0.2).any()


def slow_refined(model: object, fact: Fact, settings: KnowledgeNeurons) -> set[tuple[int, int]]:
    """The paper's words, neuron by neuron."""
    own = [
        integrated_gradients(model, encode(model, e), settings.steps, engine="plain")
        for e in (fact, *fact.paraphrase_examples)
    ]
    negative = [
        integrated_gradients(model, encode(model, e), settings.steps, engine="plain") for e in fact.neighbours
    ]
    found = set()
    for layer in range(own[0].shape[0]):
        for neuron in range(own[0].shape[1]):
            n_own = sum(bool(a[layer, neuron] >= settings.threshold * a.max()) for a in own)
            n_negative = sum(bool(a[layer, neuron] >= settings.threshold * a.max()) for a in negative)
            if n_own >= settings.share * len(own) and n_negative < settings.negative_share * len(negative):
                found.add((layer, neuron))
    return found


@pytest.mark.parametrize("negative_share", [0.5, 2.0])
def test_refined_neurons_follow_the_definition(negative_share: float) -> None:
    model = tiny_model("llama")
    settings = KnowledgeNeurons(steps=2, threshold=0.1, negative_share=negative_share)
    fact = tiny_facts()[0]
    refined = set(settings.neurons(model, fact))
    assert refined == slow_refined(model, fact, settings)
    assert refined


def test_scores_order_by_facts_counted_then_by_attribution() -> None:
    model = tiny_model("llama")
    facts = tiny_facts()
    settings = KnowledgeNeurons(steps=3)
    scores = settings.run(model, facts).values
    count = torch.zeros_like(scores)
    for fact in facts:
        for layer, neuron in settings.neurons(model, fact):
            count[layer, neuron] += 1
    assert count.max() >= 1
    torch.testing.assert_close(scores.round(), count)


def test_unrefined_scores_are_the_mean_attribution() -> None:
    model = tiny_model("neox")
    facts = tiny_facts()
    scores = KnowledgeNeurons(steps=3, refine=False).run(model, facts).values
    expected = sum(integrated_gradients(model, encode(model, fact), 3) for fact in facts) / len(facts)
    torch.testing.assert_close(scores, expected)


def test_cost_counts_every_prompt() -> None:
    model = tiny_model("llama")
    fact = tiny_facts()[0]
    with_paraphrases = KnowledgeNeurons().cost(model, [fact])
    alone = KnowledgeNeurons().cost(model, [dataclasses.replace(fact, paraphrases=(), neighbours=())])
    assert with_paraphrases.forwards > 2 * alone.forwards > 0
    assert KnowledgeNeurons(steps=40).cost(model, [fact]).backwards == pytest.approx(
        2 * with_paraphrases.backwards
    )


def test_privacy_neurons_count_texts_over_summed_tokens() -> None:
    model = tiny_model("gpt2")
    facts = tiny_facts()
    scores = PrivacyNeurons(steps=3, threshold=0.3).run(model, facts).values
    count = torch.zeros_like(scores)
    for fact in facts:
        attribution = integrated_gradients(model, encode(model, fact), 3)
        count += attribution >= 0.3 * attribution.max()
    torch.testing.assert_close(scores.round(), count)


def test_settings_out_of_range_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="share 0"):
        KnowledgeNeurons(steps=1, share=0.0).run(model, tiny_facts())
    with pytest.raises(InputError, match="threshold 2"):
        PrivacyNeurons(threshold=2.0).run(model, tiny_facts())
