"""All that is asked of a model about facts, kept on the disk, one file a fact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from locus.elicitation.rewritings import Way, rewritings
from locus.elicitation.sampler import Sampling
from locus.elicitation.subject_texts import LISTS, SUBJECT_OPENINGS, peers, subject_texts
from locus.embedded import cache_folder
from locus.errors import InputError
from locus.fact import Fact
from locus.files.artefact import load_json, save_json
from locus.model import Model

KIND = "elicited"


@dataclass(frozen=True)
class Elicitation:
    """How much is asked of the model about each fact."""

    rewritings: int = 16
    """Lists of rewritings; 0 for none."""
    rewriting_tokens: int = 64
    """Tokens of each list."""
    min_prob: float = 0.1
    """Probability that the model must give the target behind a way of asking."""
    lists: int = 6
    """Lists of names behind each opening of a list; 0 for no peers."""
    peers: int = 20
    """Peers of a subject at most."""
    texts: int = 3
    """Texts about the subject behind each opening; 0 for none."""
    text_tokens: int = 28
    """Tokens of each text."""
    seed: int = 0
    """Seed of all draws."""

    @property
    def n_tokens(self) -> int:
        """Tokens that are written about one fact at most: what it costs, in forwards of one token."""
        return (
            self.rewritings * self.rewriting_tokens
            + self.lists * len(LISTS) * 14
            + self.texts * len(SUBJECT_OPENINGS) * self.text_tokens
        )


@dataclass(frozen=True)
class Elicited:
    """What a model says about one fact."""

    ways: tuple[Way, ...] = ()
    """Ways of asking it that hold its subject, likeliest answer first."""
    peers: tuple[str, ...] = ()
    """Names of the subject's kind, most frequent first; none for a fact without a subject."""
    texts: tuple[tuple[int, ...], ...] = ()
    """Texts about the subject, as token ids; none for a fact without a subject."""


def elicit(
    model: Model, facts: Sequence[Fact], settings: Elicitation | None = None, folder: Path | None = None
) -> dict[str, Elicited]:
    """Ask the model about every fact; what was asked before is read back.

    What is found depends on the model, the settings and the fact (prompt, target, subject), not on the facts beside it.

    Args:
        model: In memory as its checkpoint is.
        facts: Ids differ.
        settings: How much is asked.
        folder: Where answers are kept; None is locus' cache folder.

    Returns:
        What was found, by the fact's id.

    Raises:
        InputError: a damaged file in the cache, or a prompt that leaves no room in the model's context.
    """
    settings = settings or Elicitation()
    folder = cache_folder() / "elicited" if folder is None else folder
    files = {fact.id: folder / f"{_key(model, fact, settings)}.json" for fact in facts}
    found = {fact.id: _read(files[fact.id]) for fact in facts if files[fact.id].exists()}
    missing = [fact for fact in facts if fact.id not in found]
    if missing:
        for fact, one in zip(missing, _ask(model, missing, settings), strict=True):
            save_json(files[fact.id], KIND, {"prompt": fact.prompt, "target": fact.target, **asdict(one)})
            found[fact.id] = one
    return {fact.id: found[fact.id] for fact in facts}


def not_found(facts: Sequence[Fact], found: Mapping[str, Elicited]) -> str | None:
    """One line that says for which facts the model gave no other way of asking, or None where it gave one for each."""
    without = [fact.id for fact in facts if not found[fact.id].ways]
    if not without:
        return None
    named = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
    return (
        f"the model gave no other way of asking {len(without)} of {len(facts)} facts ({named}): only their own "
        "sentences are edited; give paraphrases of your own as further facts with the same target"
    )


def _ask(model: Model, facts: Sequence[Fact], settings: Elicitation) -> list[Elicited]:
    """Ask anew."""
    sampling = Sampling(seed=settings.seed)
    ways = rewritings(
        model, facts, settings.rewritings, settings.rewriting_tokens, settings.min_prob, sampling
    )
    subjects = list(dict.fromkeys(fact.subject for fact in facts if fact.subject is not None))
    near = peers(model, subjects, settings.lists, most=settings.peers, sampling=sampling)
    texts = subject_texts(model, subjects, settings.texts, settings.text_tokens, sampling)
    return [
        Elicited(
            tuple(asked), tuple(near.get(fact.subject or "", ())), tuple(texts.get(fact.subject or "", ()))
        )
        for fact, asked in zip(facts, ways, strict=True)
    ]


def _key(model: Model, fact: Fact, settings: Elicitation) -> str:
    model_state = [model.fingerprint, str(model.dtype), model.bos, model.chat]
    about = [model_state, asdict(settings), fact.prompt, fact.target, fact.subject, fact.paraphrases]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def _read(path: Path) -> Elicited:
    record: Mapping[str, Any] = load_json(path, KIND)
    try:
        return Elicited(
            tuple(Way(**way) for way in record["ways"]),
            tuple(record["peers"]),
            tuple(tuple(ids) for ids in record["texts"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not what it should be ({error}); delete it") from None
