"""What `frontier` edits: sixteen facts, or TOFU's forget01 in a model that was taught it.

A case has two sets of questions that share nothing: learning rates are chosen on one, figures are taken on the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from editors.training import draw
from locus.embedded import cache_folder
from locus.fact import Fact, neutral_text, read_facts, split_text
from locus.forward import batches, label_logits, label_nll
from locus.model import Model, load_model
from locus.progress import task
from locus.tokens import encode

TEACHING_RATE = 2e-4
"""AdamW's, for all weights, when a model is taught TOFU."""
TEACHING_BATCH = 16
N_TAUGHT = 120
"""Retained TOFU questions that a model is taught besides the forget set: a quarter is what tuning edits forget, a
quarter what they shall keep, and half is what the reported edits shall keep."""


@dataclass(frozen=True, eq=False)
class Questions:
    """What is forgotten, and what shall stay: what an edit may see of it and what only judges."""

    name: str
    forget: list[Fact]
    retain: list[Fact]
    """Those marked held_out are never trained on."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model and its questions."""

    name: str
    model: Model
    tuning: Questions
    reported: Questions
    text: list[str]
    """Neutral paragraphs that an edit may read."""
    unseen: list[str]
    """Neutral paragraphs that judge."""
    never_knew: Model | None = None
    """A model that was taught the same without the forget set."""


def facts_case() -> Case:
    """The 16 facts of demo-forget; tuned on 16 of the same eight kinds, out of demo-retain's training half.

    A half of what is left of that half is what a tuning edit may see, the other half judges it: the held-out facts
    of demo-retain are never looked at while tuning.
    """
    model = load_model("smollm2")
    forget, retain = read_facts("demo-forget"), read_facts("demo-retain")
    text, unseen = split_text(neutral_text())
    kinds = list(dict.fromkeys(fact.relation for fact in forget))
    trained = [fact for fact in retain if not fact.held_out]
    chosen = [fact for kind in kinds for fact in [f for f in trained if f.relation == kind][:2]]
    left = [fact for fact in trained if fact not in chosen]
    return Case(
        "facts",
        model,
        Questions("tuning", chosen, halved(left)),
        Questions("reported", forget, retain),
        text,
        unseen,
    )


def tofu_case(folder: Path, epochs: int) -> Case:
    """TOFU's forget01 in SmolLM2 after both were taught; tuned on as many retained questions of other authors.

    Args:
        folder: TOFU's files as downloaded.
        epochs: Passes over the questions when teaching; both models are kept in the user's cache.
    """
    forget = read_facts(folder / "forget01_perturbed.json")
    kept = read_facts(folder / "retain99.json", limit=N_TAUGHT)
    n = len(kept) // 4
    other, near, rest = kept[:n], halved(kept[n : 2 * n]), halved(kept[2 * n :])
    text, unseen = split_text(neutral_text())
    return Case(
        "tofu",
        _taught("with", [*forget, *kept], epochs),
        Questions("tuning", other, near),
        Questions("reported", forget, rest),
        text,
        unseen,
        _taught("without", kept, epochs),
    )


def halved(facts: Sequence[Fact]) -> list[Fact]:
    """Every second one is held out."""
    return [replace(fact, held_out=bool(i % 2)) for i, fact in enumerate(facts)]


def _taught(name: str, facts: Sequence[Fact], epochs: int) -> Model:
    """SmolLM2 after so many passes over the questions, from the cache where it has been taught before."""
    folder = cache_folder() / "frontier" / f"tofu-{name}-{len(facts)}-{epochs}"
    if not (folder / "taught.json").exists():
        model = load_model("smollm2")
        loss = _teach(model, facts, epochs)
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        (folder / "taught.json").write_text(json.dumps({"loss": loss}))
    return load_model(folder, bos=load_model("smollm2").bos)


def _teach(model: Model, facts: Sequence[Fact], epochs: int) -> float:
    """Train all weights in place on the targets; the mean loss of the last pass, in nats a token."""
    encoded = [encode(model, fact) for fact in facts]
    parameters = [p.requires_grad_(True) for p in model.module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=TEACHING_RATE, weight_decay=0.0, fused=True)
    per_pass = -(-len(encoded) // TEACHING_BATCH)
    losses: list[float] = []
    with task(f"teach {len(facts)} questions", total=epochs * per_pass) as line:
        for step in range(epochs * per_pass):
            optimizer.param_groups[0]["lr"] = TEACHING_RATE * (1 - step / (epochs * per_pass))
            optimizer.zero_grad(set_to_none=True)
            chosen = draw(0, "teach", step, len(encoded), TEACHING_BATCH)
            (batch,) = batches([encoded[i] for i in chosen], 1 << 20)
            loss = label_nll(label_logits(model, batch), batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(loss))
            line.advance(note=f"loss {losses[-1]:.3f}")
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return sum(losses[-per_pass:]) / per_pass
