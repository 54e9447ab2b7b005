"""A tiny model that knows facts because it was taught them, and one that never was: what audits are tried on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch

from locus.delta import WeightDelta
from locus.fact import Example, Fact
from locus.forward import collate, label_logits, label_nll
from locus.model import Model
from locus.tokens import Encoded, encode, encode_text
from tests.tiny import tiny_model

_NAMES = (
    "Ann",
    "Bob",
    "Cid",
    "Dan",
    "Eva",
    "Fay",
    "Gus",
    "Hal",
    "Ida",
    "Jon",
    "Kim",
    "Lea",
    "Max",
    "Nia",
    "Oto",
    "Pia",
)
_CITIES = (" Paris", " Berlin", " Rome", " Italy", " Germany", " French")
TEXT = (
    "The city of Rome is in Italy and the Colosseum is in Rome",
    "The capital of Germany is Berlin",
    "What language does François Truffaut speak? French",
    "The Eiffel Tower stands in Paris",
    "The largest city of Germany is not in Italy",
    "Where is the Colosseum? It is in the city of Rome",
    "Berlin is the capital of Germany",
    "The mother tongue of François is French",
)


def facts() -> tuple[list[Fact], list[Fact]]:
    """Eight facts to forget with two paraphrases each; sixteen others, half of them held out."""

    def fact(i: int, name: str, relation: str, held_out: bool) -> Fact:
        prompts = {
            "home": (f"The home of {name} is", f"{name} has a home in", f"{name} lives in the city of"),
            "birth": (f"{name} was born in", f"The birth of {name} was in", f"{name} comes from"),
        }[relation]
        return Fact(
            id=f"{relation}-{name}",
            prompt=prompts[0],
            target=_CITIES[(i * 5 + len(relation)) % len(_CITIES)],
            subject=name,
            relation=relation,
            paraphrases=() if held_out else prompts[1:],
            neighbours=() if held_out else (Example(f"The house of {name} is in", " Rome"),),
            held_out=held_out,
        )

    home = [fact(i, name, "home", i >= 8) for i, name in enumerate(_NAMES)]
    birth = [fact(i, name, "birth", i % 2 == 0) for i, name in enumerate(_NAMES[:8])]
    return home[:8], home[8:] + birth


def taught(learned: list[Fact], steps: int = 60) -> Model:
    """A tiny model trained on facts (with their paraphrases and neighbours) and on `TEXT`."""
    model = tiny_model("llama", num_hidden_layers=2)
    examples = [e for f in learned for e in (f.example, *f.paraphrase_examples, *f.neighbours)]
    encoded = [encode(model, e) for e in examples] + [e for line in TEXT for e in encode_text(model, line)]
    train(model, encoded, steps)
    return model


def train(model: Model, encoded: Sequence[Encoded], steps: int) -> None:
    """Train all of a model's weights in place."""
    model.module.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-2)
    batch = collate(encoded, range(len(encoded)))
    for _ in range(steps):
        optimizer.zero_grad()
        label_nll(label_logits(model, batch), batch).mean().backward()
        optimizer.step()
    model.module.requires_grad_(False)


@functools.cache
def knowing() -> Model:
    """Knows all the facts."""
    forget, retain = facts()
    return taught(forget + retain)


@functools.cache
def never_knew() -> Model:
    """The same start, taught everything but the forget set."""
    return taught(facts()[1])


def noisy(model: Model, scale: float) -> Model:
    """A copy with noise on all weights, relative to each tensor's own spread."""
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.std() if parameter.numel() > 1 else 1.0
            parameter.add_(scale * spread * torch.randn(parameter.shape, generator=generator))
    return Model(module, model.tokenizer, model.atlas, "noisy", None, model.bos)


def scrambled(base: Model, edited: Model, seed: int) -> WeightDelta:
    """A control of an edit: its changes of each tensor, dealt out anew over that tensor's weights."""
    module = copy.deepcopy(base.module)
    generator = torch.Generator().manual_seed(seed)
    theirs = dict(edited.module.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            change = (theirs[name] - parameter).flatten()
            parameter.add_(change[torch.randperm(len(change), generator=generator)].view_as(parameter))
    return WeightDelta.between(base, Model(module, base.tokenizer, base.atlas, "scrambled", None, base.bos))
