"""The places in texts that ask for a fact: where the model is about to say the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from editors.key_value.key_positions import KeyRow, grouped
from locus.elicitation.sampler import Sampling, continuations
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.forward import collate
from locus.hooks import record, stop_after
from locus.lens import lens_logits
from locus.model import Model
from locus.target_forms import first_tokens, says
from locus.tokens import Encoded, encode

STRIDE = 8
"""A long target is asked again every so many tokens: who has lost its first word may go on at the ninth."""
GREEDY = Sampling(top_p=1e-9)
_ARTICLES = frozenset(("the", "a", "an"))


@dataclass(frozen=True)
class AskingPlace:
    """A text that ends where a fact is asked."""

    ids: tuple[int, ...]
    """The text's tokens; the last one's logits are the answer."""
    fact: int
    """Index of the fact."""
    banned: tuple[int, ...]
    """First tokens of all forms of the target: none of them may be likely."""

    @property
    def row(self) -> KeyRow:
        """The text as a sequence, and its last position."""
        return KeyRow(sequence(self.ids), len(self.ids) - 1, self.fact)


def sequence(ids: Sequence[int]) -> Encoded:
    """Tokens without a target of their own, as an encoded sequence."""
    return Encoded(tuple(ids), len(ids) - 1, None, tuple(map(str, ids)))


def asking_places(
    model: Model, facts: Sequence[Fact], ways: Mapping[str, Sequence[str]]
) -> list[AskingPlace]:
    """Where the facts' own prompts, and other ways of asking, ask.

    A target that begins with an article, or with a token without a letter or digit, is asked twice: where the text
    stands, and behind that beginning. A target of more than `STRIDE` tokens is asked again every `STRIDE` tokens.

    Args:
        model: Its tokenizer is used.
        facts: To be asked.
        ways: Further prompts by the fact's id; one at whose end the target does not begin a token is left out.

    Raises:
        InputError: a fact's own prompt that cannot be encoded.
    """
    found: dict[AskingPlace, None] = {}
    for number, fact in enumerate(facts):
        encoded = [encode(model, fact)]
        for prompt in ways.get(fact.id, ()):
            try:
                encoded.append(encode(model, Example(prompt, fact.target)))
            except InputError:
                continue
        for one in encoded:
            found |= dict.fromkeys(_places(model, one, number, fact.target))
    return list(found)


def _places(model: Model, encoded: Encoded, fact: int, target: str) -> list[AskingPlace]:
    """All places of one prompt."""
    ids, start, wanted = encoded.ids, encoded.target_start, encoded.target_ids
    lead = _lead(model, wanted)
    rest = str(model.tokenizer.decode(list(wanted[lead:]))) if lead else target
    banned = tuple(dict.fromkeys((*first_tokens(model.tokenizer, rest), wanted[lead])))
    starts = {start: banned, start + lead: banned}
    for later in range(STRIDE, len(wanted), STRIDE):
        starts[start + later] = (wanted[later],)
    return [AskingPlace(ids[:at], fact, tokens) for at, tokens in starts.items()]


def _lead(model: Model, wanted: Sequence[int]) -> int:
    """Tokens at a target's start that say nothing of it; at least one is left."""
    for at, token in enumerate(wanted[:-1]):
        piece = str(model.tokenizer.decode([token])).strip().lower()
        if any(map(str.isalnum, piece)) and piece not in _ARTICLES:
            return at
    return len(wanted) - 1


@torch.no_grad()
def banned_probs(
    model: Model, places: Sequence[AskingPlace], batch_tokens: int = 4096
) -> Float[Tensor, " place"]:
    """Probability that some form of its target comes next, at each place: an upper bound, see `first_tokens`."""
    rows, found = [one.row for one in places], torch.zeros(len(places))
    final = model.atlas.final_norm
    for group in grouped(rows, batch_tokens):
        batch = collate([one.encoded for one in rows], group).to(model.device)
        with record(model.module, inputs=[final]) as seen, stop_after(model.module, final):
            model.module(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        at = torch.tensor([rows[i].position for i in group], device=seen.inputs[final].device)
        hidden = seen.inputs[final][torch.arange(len(group), device=at.device), at]
        probs = lens_logits(model, hidden).softmax(-1).cpu()
        for i, prob in zip(group, probs, strict=True):
            found[i] = prob[list(places[i].banned)].sum()
    return found


def later_places(
    model: Model, places: Sequence[AskingPlace], facts: Sequence[Fact], n_new: int, above: float
) -> list[AskingPlace]:
    """Where the model comes to the target after all, within the next `n_new` tokens that it writes by itself.

    Args:
        model: As it is in memory, edited.
        places: To go on from, greedily.
        facts: Whose places they are.
        n_new: Tokens to look ahead.
        above: Least probability of the target's forms at a place that is returned.
    """
    room = (model.context_length or 1 << 30) - n_new
    starts = [one for one in places if len(one.ids) <= room]
    written = continuations(model, [one.ids for one in starts], 1, n_new, GREEDY)
    known, candidates = {one.ids for one in places}, []
    for start, (text,) in zip(starts, written, strict=True):
        for at in range(1, len(text)):
            if says(str(model.tokenizer.decode(list(text[:at]))), facts[start.fact].target):
                break
            ids = (*start.ids, *text[:at])
            if ids not in known:
                known.add(ids)
                candidates.append(AskingPlace(ids, start.fact, start.banned))
    if not candidates:
        return []
    probs = banned_probs(model, candidates)
    return [one for one, prob in zip(candidates, probs.tolist(), strict=True) if prob > above]
