"""TOFU's forget01 in SmolLM2, for `frontier`: two models are taught, one of them without what is forgotten.

Answers are sentences, so probabilities are per token: exp(-NLL / tokens), TOFU's own measure. Arms are compared where
that of the questions to forget is what the model has of them that never saw them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.lib.frontier_cases import Case, Figures, Questions, halved
from editors.training.settings import draw
from locus import metrics
from locus.audit.attacks.relearn import relearn
from locus.audit.intervals import Items, mean_interval
from locus.audit.neutral_text import read_text
from locus.audit.questions import Answers, ask
from locus.audit.questions import Questions as Asked
from locus.audit.run import ask_about
from locus.audit.settings import RelearnAttack
from locus.audit.state import State
from locus.audit.suites.tofu import Tofu, read_tofu
from locus.delta import WeightDelta
from locus.embedded import cache_folder
from locus.fact import Fact, neutral_text, read_facts, split_text
from locus.forward import collate, label_logits, label_nll
from locus.mask import WeightMask
from locus.model import Model, load_model
from locus.progress import task
from locus.tokens import encode, encode_text

TEACHING_RATE = 2e-4
"""AdamW's, for all weights, when a model is taught TOFU."""
TEACHING_BATCH = 16
N_TAUGHT = 80
"""Retained questions that a model is taught besides the forget set; every second one is held out from the edits."""
UNSEEN = 8
"""Neutral paragraphs that tell the KL."""
COLUMNS = {
    "forget": "p, a token",
    "truth_ratio": "truth ratio",
    "forget_quality": "forget quality",
    "held_out": "p of held-out",
    "kl": "KL",
    "relearned": "p relearned",
}


def tofu_case(folder: Path, epochs: int) -> Case:
    """See the module.

    Args:
        folder: TOFU's files as downloaded.
        epochs: Passes over the questions when teaching; both models are kept in the user's cache.
    """
    forget = read_facts(folder / "forget01_perturbed.json")
    kept = read_facts(folder / "retain99.json", limit=N_TAUGHT)
    text, unseen = split_text(neutral_text())
    model, never = _taught("with", [*forget, *kept], epochs), _taught("without", kept, epochs)
    asked = Questions("reported", forget, halved(kept))
    suite = Tofu({"forget": read_tofu(folder).sets["forget"]})
    judge = TofuJudge(model, never, ask_about(model, forget, asked.retain), suite, unseen[:UNSEEN])
    return Case(
        "tofu",
        model,
        asked,
        text,
        COLUMNS,
        {
            "held_out": "p of held-out (high is good)",
            "forget_quality": "forget quality (high is good)",
            "relearned": "p relearned (low is good)",
        },
        judge,
        likely=per_token,
        goal=float(per_token(ask(never, ask_about(never, forget, [])["forget"])).mean()),
        forget_per_step=8,
        retain_facts=4,
        points=5,
        beside=lambda: {
            "before": judge.of(State("before", "base", model)),
            "never knew": judge.of(State("never knew", "reference", never)),
        },
    )


def per_token(answers: Answers) -> Float[Tensor, " question"]:
    """exp(-NLL / tokens): TOFU's probability."""
    return (-answers.nll / answers.n_tokens).exp()


@dataclass(frozen=True, eq=False)
class TofuJudge:
    """TOFU's measures, beside the model that never knew."""

    model: Model
    never_knew: Model
    asked: Mapping[str, Asked]
    suite: Tofu
    """Only the questions to forget."""
    unseen: Sequence[str]
    """Neutral paragraphs."""

    def __call__(self, delta: WeightDelta, mask: WeightMask) -> Figures:
        """The figures of one edit."""
        assert delta.outside(mask) == 0, "weights outside the mask differ"
        return self.of(State("edit", "edit", self.model, delta))

    @cached_property
    def reference(self) -> Float[Tensor, " question"]:
        """Truth ratios of the model that never knew."""
        return self.suite.score(self.never_knew, "forget").truth_ratio

    def of(self, state: State) -> Figures:
        """The figures of one model."""
        forget, held_out = self.asked["forget"], self.asked["held_out"]
        with state.active() as model:
            scores = self.suite.score(model, "forget")
            said = ask(model, held_out)
            again = relearn(model, forget, RelearnAttack(at=(4,)))
        pieces = [p for text in self.unseen for p in encode_text(self.model, text)]
        read = read_text((State("base", "base", self.model), state), pieces)
        tokens = {one: encoded.n_target for one, encoded in zip(forget.facts, forget.encoded, strict=True)}
        taught_again = again.tested_nll[-1] / torch.tensor([tokens[one] for one in again.tested])
        ratio = metrics.truth_ratio_score(scores.truth_ratio, True)
        return {
            "forget": _figure(forget.facts, scores.prob),
            "truth_ratio": _figure(forget.facts, ratio),
            "forget_quality": {"mean": metrics.forget_quality(scores.truth_ratio, self.reference)},
            "held_out": _figure(held_out.facts, per_token(said)),
            "kl": {"mean": float(read[state.name].kl.mean())},
            "relearned": _figure(again.tested, (-taught_again).exp()),
        }


def _figure(ids: Sequence[str], values: Tensor) -> dict[str, Any]:
    found = mean_interval(Items(tuple(ids), values))
    assert found is not None, "there is always a question"
    return {"mean": found.mean, "low": found.low, "high": found.high}


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
            batch = collate(encoded, chosen)
            loss = label_nll(label_logits(model, batch), batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            line.advance(note=f"loss {losses[-1]:.3f}")
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return sum(losses[-per_pass:]) / per_pass
