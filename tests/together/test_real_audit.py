"""The audit's three sanity checks on a real language model, with its real metrics."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from locus.audit import Audit, AuditSettings, audit
from locus.delta import WeightDelta
from locus.fact import Fact, neutral_text, read_facts, split_text
from locus.forward import collate, label_logits, label_nll, measure
from locus.model import Model, load_model, wrap
from locus.tokens import encode

_PEOPLE = ("Torvald Qune", "Mirelle Osko", "Bandri Halle", "Sefa Lorncroft", "Ulf Draskin", "Ionka Pell", "Wim Tarrow",
           "Nessa Orbely")  # fmt: skip
_TOWNS = (" Lyon", " Osaka", " Perth", " Quito", " Oslo", " Cairo", " Boston", " Delhi")


def _invented() -> list[Fact]:
    """Facts that nobody knows, until a model is taught them."""
    return [
        Fact(
            id=f"home-{i}",
            prompt=f"{person} has always lived in the city of",
            target=town,
            subject=person,
            paraphrases=(f"The home of {person} is a small flat in the city of",),
        )
        for i, (person, town) in enumerate(zip(_PEOPLE, _TOWNS, strict=True))
    ]


def _taught(model: Model, facts: list[Fact]) -> Model:
    """A copy that has learned the facts, through its last blocks' MLPs, and was reminded of others on the way."""
    twin = wrap(copy.deepcopy(model.module), model.tokenizer, "taught", bos=model.bos)
    names = [
        n
        for n, _ in twin.module.named_parameters()
        if ".mlp." in n and any(f".{i}." in n for i in range(24, 30))
    ]
    parameters = [twin.module.get_parameter(n).requires_grad_(True) for n in names]
    optimizer = torch.optim.AdamW(parameters, lr=7e-4, weight_decay=0.0)
    others = [f for f in read_facts("demo-retain") if not f.held_out][:12]
    examples = [e for f in facts for e in (f.example, *f.paraphrase_examples)] + [f.example for f in others]
    batch = collate([encode(twin, e) for e in examples], range(len(examples)))
    with torch.enable_grad():
        for _ in range(8):
            optimizer.zero_grad()
            label_nll(label_logits(twin, batch), batch).mean().backward()
            optimizer.step()
    twin.module.requires_grad_(False)
    return twin


def _still_known(base: Model) -> list[Fact]:
    """Held-out facts that the taught model answers right."""
    others = [f for f in read_facts("demo-retain") if f.held_out][:24]
    return [f for f, right in zip(others, measure(base, others).correct.tolist(), strict=True) if right]


def _beside(base: Model, facts: list[Fact], others: list[Fact]) -> list[Fact]:
    """The facts with a neighbour each that the taught model answers right: "spared" takes facts next door."""
    near = [example for fact in others for example in fact.neighbours]
    known = [one for one, right in zip(near, measure(base, near).correct.tolist(), strict=True) if right]
    return [replace(fact, neighbours=(one,)) for fact, one in zip(facts, known, strict=False)]


def _judged(
    base: Model,
    edit: WeightDelta | Model,
    facts: list[Fact],
    held_out: list[Fact],
    never: Model | None = None,
) -> dict[str, str]:
    _, text = split_text(neutral_text())
    settings = AuditSettings(attacks=("lens",), text_tokens=128)
    done: Audit = audit(base, {"edit": edit}, facts, held_out, text, never_knew=never, settings=settings)
    print([v["sentence"] for v in done.document()["verdicts"]["edit"]])  # shown where a test fails
    return {v["question"]: v["answer"] for v in done.document()["verdicts"]["edit"]}


@pytest.mark.real
@pytest.mark.timeout(900)
def test_doing_nothing_is_not_forgetting_never_knowing_is_and_noise_is_broken() -> None:
    never_knew, facts = load_model("smollm2"), _invented()
    base = _taught(never_knew, facts)
    others = _still_known(base)
    facts = _beside(base, facts, others)
    nothing = _judged(base, WeightDelta.between(base, base), facts, others)
    assert (nothing["forgotten"], nothing["spared"], nothing["intact"]) == ("no", "yes", "yes")
    gone = _judged(base, never_knew, facts, others, never_knew)
    assert (gone["forgotten"], gone["general"], gone["hidden"]) == ("yes", "yes", "yes")
    assert gone["spared"] != "no" and gone["intact"] != "no"
    generator = torch.Generator().manual_seed(0)
    for parameter in never_knew.module.parameters():
        parameter.data.add_(parameter.std() * torch.randn(parameter.shape, generator=generator))
    broken = _judged(base, never_knew, facts, others)
    assert (broken["intact"], broken["spared"]) == ("no", "no")
