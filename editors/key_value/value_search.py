"""The gradient descent on value deltas: what the model is asked, what is minimized, and when a key is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from editors.key_value.edit_target import EditTarget, answers, judged_per_token
from editors.key_value.key_positions import KeyRow, Place, row, with_prefix
from editors.key_value.prefix import delta_forwards
from locus.errors import InputError
from locus.fact import Fact
from locus.forward import Batch
from locus.metrics import kl_divergence, token_nll
from locus.model import Model
from locus.tokens import encode

Role = Literal["answer", "target", "essence"]
"""answer: a prompt with the text that the edit target is measured on; target: a prompt with its own, sentence-long
target, where that text is another; essence: "{subject} is a", which must go on as before."""


@dataclass(frozen=True, eq=False)
class AskedRows:
    """The sequences of one search. A row's owner is the index of its key."""

    facts: Sequence[Fact]
    """Every fact, key after key."""
    key: Int64[Tensor, " fact"]
    """Index of each fact's key."""
    first_token: Int64[Tensor, " fact"]
    """What each fact's own target begins with."""
    sentence: Bool[Tensor, " fact"]
    """Facts to forget whose target is judged by the token."""
    rows: Sequence[KeyRow]
    fact: Int64[Tensor, " row"]
    """Index of each row's fact."""
    role: Sequence[Role]
    """Each row's role."""


def asked_rows(
    model: Model,
    groups: Sequence[Sequence[Fact]],
    target: EditTarget,
    prefixes: Sequence[str],
    place: Place,
) -> AskedRows:
    """Each fact plain and after every context prefix with the answer wanted, and each key's essence prompt.

    Raises:
        InputError: a fact without what the edit target needs (alternatives, a subject), or one that cannot be encoded.
    """
    facts = [fact for group in groups for fact in group]
    key = [number for number, group in enumerate(groups) for _ in group]
    ids = [encode(model, fact).target_ids for fact in facts]
    sentence = [target.to != "rewrite" and judged_per_token(len(one)) for one in ids]
    rows: list[KeyRow] = []
    of: list[int] = []
    roles: list[Role] = []

    def ask(fact: Fact, number: int, role: Role) -> None:
        rows.append(row(model, fact, key[number], "subject" if role == "essence" else place))
        of.append(number)
        roles.append(role)

    for number, fact in enumerate(facts):
        for prefix in ("", *prefixes):
            for answer in answers(fact, target):
                ask(with_prefix(replace(fact, target=answer), prefix), number, "answer")
                if sentence[number] and answer != fact.target:
                    ask(with_prefix(fact, prefix), number, "target")
    asked: set[int] = set()
    for number, fact in enumerate(facts):
        if target.kl and place == "subject" and fact.subject is not None and key[number] not in asked:
            asked.add(key[number])
            prompt = f"{fact.subject} is a"
            said = Fact(id="essence", prompt=prompt, target=" thing", subject=fact.subject, subject_start=0)
            ask(said, number, "essence")
    firsts = torch.tensor([one[0] for one in ids])
    return AskedRows(facts, torch.tensor(key), firsts, torch.tensor(sentence), rows, torch.tensor(of), roles)


@dataclass(frozen=True, eq=False)
class Guesses:
    """The first tokens of each fact's wrong answers; unused places have no weight."""

    ids: Int64[Tensor, "fact guess"]
    weights: Float[Tensor, "fact guess"]
    """The probability each is to have."""

    @classmethod
    def of(cls, model: Model, facts: Sequence[Fact]) -> Guesses:
        """Of all facts.

        Raises:
            InputError: a fact whose wrong answers all begin as the right one does.
        """
        found = []
        for fact in facts:
            right = encode(model, fact).target_ids[0]
            said = [encode(model, replace(fact, target=wrong)).target_ids[0] for wrong in fact.alternatives]
            ids = [one for one in dict.fromkeys(said) if one != right]
            if not ids:
                raise InputError(
                    f"{fact.source or f'fact {fact.id!r}'}: every alternative begins with the token that the target "
                    "begins with: add another, or use --target-to refusal"
                )
            found.append(ids)
        most = max(map(len, found))
        return cls(
            torch.tensor([ids + ids[:1] * (most - len(ids)) for ids in found]),
            torch.tensor([[1 / len(ids)] * len(ids) + [0.0] * (most - len(ids)) for ids in found]),
        )

    def divergence(
        self, logits: Float[Tensor, "label d_vocab"], fact: Int64[Tensor, " label"]
    ) -> Float[Tensor, " label"]:
        """KL(guesses || edited) of each label, in nats."""
        ids, weights = self.ids[fact].to(logits.device), self.weights[fact].to(logits)
        return (torch.xlogy(weights, weights) - weights * logits.log_softmax(-1).gather(-1, ids)).sum(-1)


class ValueSearch:
    """Adam on the value deltas of all keys that are not done yet.

    A key is done when each of its facts is: by its loss, or by the probability that is left of its target.
    """

    def __init__(
        self,
        model: Model,
        site: str,
        asked: AskedRows,
        target: EditTarget,
        start: Float[Tensor, "key d_model"],
        batch_tokens: int,
    ) -> None:
        self.target, self.asked = target, asked
        self.guesses = Guesses.of(model, asked.facts) if target.to == "alternatives" else None
        self.owner = torch.tensor([one.owner for one in asked.rows])
        self.is_answer, self.is_target, self.is_essence = (
            torch.tensor([role == which for role in asked.role]) for which in ("answer", "target", "essence")
        )
        if target.to in ("alternatives", "entropy"):  # the answer measured on is the fact's own target
            self.is_target = self.is_answer & asked.sentence[asked.fact]
        n_facts = len(asked.facts)
        self.n_answers = torch.bincount(asked.fact[self.is_answer], minlength=n_facts)
        self.n_targets = torch.bincount(asked.fact[self.is_target], minlength=n_facts)
        self.forwards = delta_forwards(model, site, asked.rows, batch_tokens)
        self.norm = start.norm(dim=1).clamp_min(1e-12)
        self.unit = (self.norm / start.shape[1] ** 0.5)[:, None]  # the delta is kept in these units
        self.raw = torch.zeros(start.shape, dtype=torch.float32, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.raw], lr=target.lr)
        self.loss = torch.full((n_facts,), math.inf)
        self.prob = torch.ones(n_facts)
        self.first_prob: Float[Tensor, " fact"] | None = None
        self.active = torch.ones(len(start), dtype=torch.bool)
        self.steps = 0
        self.before = self._essence_before()

    @property
    def delta(self) -> Float[Tensor, "key d_model"]:
        scaled: Tensor = self.raw * self.unit
        return scaled

    def step(self) -> bool:
        """One step of the keys that are not done yet; False when none is left."""
        delta = self.delta.detach().requires_grad_()  # a leaf, so that each batch may be done with at once
        self._measure(delta)
        left = torch.zeros(len(self.active)).index_add(0, self.asked.key, (~self._done()).float())
        self.active &= left > 0
        if not bool(self.active.any()):
            return False
        assert delta.grad is not None
        held = self.raw.detach().clone()
        with torch.no_grad():
            self.raw.grad = (delta.grad * self.unit).to(self.raw)
            length = held.norm(dim=1, keepdim=True).clamp_min(1e-12)
            unit, norm = self.unit.to(held), self.norm.to(held)[:, None]
            # d/d raw of decay * ||delta|| / ||start||^2
            self.raw.grad += self.target.decay * unit / norm**2 * held / length * (held.norm() > 0)
        self.optimizer.step()
        with torch.no_grad():
            length = self.delta.norm(dim=1)
            most = (self.target.clamp * self.norm / length.clamp_min(1e-12)).clamp_max(1.0)
            self.raw.mul_(most[:, None].to(self.raw))
            self.raw[~self.active] = held[~self.active]
        self.steps += 1
        return True

    def _done(self) -> Bool[Tensor, " fact"]:
        """Facts that the loss stop or the target-probability stop leaves as they are."""
        if self.first_prob is None:
            self.first_prob = self.prob
        done = self.loss <= self.target.loss_stop
        if self.target.to == "rewrite":
            return done
        limit = torch.where(
            self.asked.sentence, self.target.sentence_stop * self.first_prob, self.target.prob_stop
        )
        return done | (self.prob <= limit)

    @torch.enable_grad()
    def _measure(self, delta: Float[Tensor, "key d_model"]) -> None:
        """Loss of every fact of an active key, and the gradient of all that is minimized but the delta's length."""
        loss, prob, logprob = (torch.zeros(len(self.loss), dtype=torch.float64) for _ in range(3))
        fact = self.asked.fact
        due = self.active[self.owner].nonzero().flatten().tolist()
        for batch, logits in self.forwards(due, delta):
            essence, answer, own = (
                which[batch.example] for which in (self.is_essence, self.is_answer, self.is_target)
            )
            total = self._essence_term(logits[essence], batch.example[essence]).sum()
            terms = self._answer_terms(logits[answer], batch.labels[answer], batch.example[answer])
            of = fact[batch.example[answer]]
            terms = terms / self.n_answers[of].to(logits.device)
            loss.index_add_(0, of, terms.detach().double().cpu())
            total = total + terms.sum()
            first = _firsts(batch.example[answer])
            probs = logits[answer].detach().softmax(-1)[first, self.asked.first_token[of[first]]]
            prob.index_add_(0, of[first], probs.double().cpu() / self.n_answers[of[first]])
            if bool(own.any()):
                rest, said = self._sentence_terms(logits[own], batch, own)
                of = fact[batch.example[own]]
                loss.index_add_(0, of, rest.detach().double().cpu())
                logprob.index_add_(0, of, said)
                total = total + rest.sum()
            total.backward()
        active = self.active[self.asked.key]
        prob = torch.where(self.asked.sentence, logprob.exp(), prob)
        self.loss = torch.where(active, loss.float(), self.loss)
        self.prob = torch.where(active, prob.float(), self.prob)

    def _answer_terms(
        self,
        logits: Float[Tensor, "label d_vocab"],
        labels: Int64[Tensor, " label"],
        example: Int64[Tensor, " label"],
    ) -> Float[Tensor, " label"]:
        """Each label's share of its row's loss; of guesses, which are first tokens, only the first label has one."""
        if self.guesses is not None:
            divergence = self.guesses.divergence(logits, self.asked.fact[example])
            return divergence * _firsts(example).to(logits)
        n_labels = torch.bincount(example)[example].to(logits.device)
        if self.target.to == "entropy":
            logprob = logits.log_softmax(-1)
            return ((logprob.exp() * logprob).sum(-1) + math.log(logits.shape[-1])) / n_labels
        return token_nll(logits, labels) / n_labels

    def _sentence_terms(
        self, logits: Float[Tensor, "label d_vocab"], batch: Batch, own: Bool[Tensor, " every"]
    ) -> tuple[Float[Tensor, " label"], Float[Tensor, " label"]]:
        """Of the tokens of sentence-long targets: unlikelihood −log(1 − p), and log p, each as its share of the mean.

        The first term is for tokens that no other term sees: 0 for the entropy target, and for the first token of
        guesses.
        """
        labels, example = batch.labels[own].to(logits.device), batch.example[own]
        n_labels = torch.bincount(example)[example]
        n_rows = self.n_targets[self.asked.fact[example]]
        logprob = -token_nll(logits, labels)
        said = logprob.detach().double().cpu() / n_labels / n_rows
        if self.target.to == "entropy":
            return torch.zeros_like(logprob), said
        seen = _firsts(example) if self.guesses is not None else torch.zeros(len(example), dtype=torch.bool)
        unlikely = -torch.log1p(-logprob.exp().clamp_max(1 - 1e-6))
        n_rest = (n_labels - int(self.guesses is not None)).clamp_min(1)
        share = (~seen).to(logits) / n_rest.to(logits) / n_rows.to(logits)
        return unlikely * share, said

    @torch.no_grad()
    def _essence_before(self) -> dict[int, Float[Tensor, " d_vocab"]]:
        """Log-probabilities of what follows "{subject} is a", by row, before any delta is added."""
        found: dict[int, Tensor] = {}
        rows = self.is_essence.nonzero().flatten().tolist()
        for batch, logits in self.forwards(rows, self.delta.detach()):
            first = _firsts(batch.example)
            found |= dict(zip(batch.example[first].tolist(), logits[first].log_softmax(-1), strict=True))
        return found

    def _essence_term(
        self, logits: Float[Tensor, "label d_vocab"], example: Int64[Tensor, " label"]
    ) -> Float[Tensor, " label"]:
        """KL of what follows "{subject} is a" from before, by label, weighted; only the first label has one."""
        first = _firsts(example)
        logits, rows = logits[first], example[first].tolist()
        if not rows:
            return logits.sum(-1)
        before = torch.stack([self.before[i] for i in rows])
        return self.target.kl * kl_divergence(before, logits)


def _firsts(example: Int64[Tensor, " label"]) -> Bool[Tensor, " label"]:
    """Which labels are their rows' first; a row's labels stand together."""
    first = torch.ones(len(example), dtype=torch.bool)
    first[1:] = example[1:] != example[:-1]
    return first
