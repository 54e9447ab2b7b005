"""Texts as tokens: where the target begins, which tokens are the subject.

Prompt and target are tokenized together, since that is how the model reads them, and places are found by the
character offsets of the fast tokenizer. A search over decoded tokens would miss subjects of several words
under SentencePiece and non-ASCII ones under byte-level BPE.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from locus.chat_template import Turn, turn
from locus.errors import InputError
from locus.fact import Example, Fact
from locus.model import Model
from locus.readers.scripts import is_spaceless

_SPACE_MARKS = "Ġ▁"  # how byte-level BPE and SentencePiece write a space in a token's name
_SECOND_BYTE = "\ufffd"  # shown for a token that only completes a character begun by the one before


@dataclass(frozen=True)
class Encoded:
    """One sequence for the model, and what it is made of."""

    ids: tuple[int, ...]
    """BOS, where the model has one, then prompt and target."""
    target_start: int
    """Index of the target's first token; at least 1, so that something predicts it."""
    subject: tuple[int, int] | None
    """Half-open range of the subject's tokens."""
    tokens: tuple[str, ...]
    """The text of each token; a token that only completes a character begun before shows as U+FFFD."""
    n_end: int = 0
    """How many of the last tokens end the model's turn in a conversation: tokens of the target, not of what it says."""

    @property
    def without_end(self) -> Encoded:
        """The same without the tokens that end the turn: what the model is to know, and not that it is to stop."""
        n = len(self.ids) - self.n_end
        return self if not self.n_end else replace(self, ids=self.ids[:n], tokens=self.tokens[:n], n_end=0)

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The tokens to predict."""
        return self.ids[self.target_start :]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """BOS and prompt."""
        return self.ids[: self.target_start]

    @property
    def n_target(self) -> int:
        """Tokens in the target; at least 1."""
        return len(self.ids) - self.target_start


class _Token(NamedTuple):
    id: int
    name: str  # in the vocabulary: "Ġis"
    start: int  # characters of the text; the space before a word belongs to the word's token
    end: int

    @property
    def is_mark(self) -> bool:
        """A space and nothing else; at the start of a text perhaps not even a space of the text."""
        return not self.name.strip(_SPACE_MARKS)


def encode(model: Model, example: Example | Fact) -> Encoded:
    """Tokens of prompt and target, with the target's start and a fact's subject.

    A model that is asked in conversation (`Model.chat`) reads them as its chat template writes them. Only the answer's
    tokens are target then, with the end of the turn (`Encoded.n_end`; see `chat_template`). Special tokens are the
    template's, and the model's own `bos` (no second one where the text begins with it).

    Raises:
        InputError: a token covers the end of the prompt and the start of the target; the target has a
            character that the tokenizer does not know; a token has no row in the embedding; the text is
            longer than the model's context.
    """
    try:
        return _encode(model, example)
    except InputError as error:
        named = (example.source or f"fact {example.id!r}") + ": " if isinstance(example, Fact) else ""
        raise InputError(f"{named}{error}") from None


def encode_text(model: Model, text: str, block: int = 512) -> list[Encoded]:
    """Free text in blocks of at most `block` tokens (or the model's context); every token is target once.

    The first token of a block is context: BOS, or else the last token of the block before, and for the first
    block the text's own first token, which is then nobody's target.

    Raises:
        InputError: the text has no token to predict, or `block` is below 2.
    """
    block = min(block, model.context_length or block)
    if block < 2:
        raise InputError(f"blocks of {block} token: give at least 2, one to read and one to predict")
    tokens = _tokenize(model, text)
    bos = _bos(model, tokens)
    context, rest = ([bos], tokens) if bos else (tokens[:1], tokens[1:])
    if not rest:
        raise InputError(f"nothing to predict in the text {text!r}: give more of it")
    shown = _shown(text, [*context, *rest])
    blocks = []
    for start in range(0, len(rest), block - 1):
        piece = [*context, *rest[start : start + block - 1]]
        names = (shown[0], *shown[start + 1 : start + len(piece)])
        blocks.append(Encoded(tuple(token.id for token in piece), 1, None, names))
        if not bos:
            context = piece[-1:]
            shown = (shown[start + len(piece) - 1], *shown[1:])
    return blocks


def _encode(model: Model, example: Example | Fact) -> Encoded:
    told = Turn(example.prompt, example.target, 0)
    if model.chat:
        told = turn(model.tokenizer, example.prompt, example.target)
    text, boundary = told.prompt + told.target + told.end, len(told.prompt)
    said_until = boundary + len(told.target)
    tokens = _tokenize(model, text)
    for token in tokens:
        if token.start < boundary < token.end and not example.running_text:
            raise InputError(_straddles(text[token.start : token.end], told.prompt, told.target))
    if bos := _bos(model, tokens):
        tokens = [bos, *tokens]
    target_start = sum(token.start < boundary for token in tokens)
    n_end = sum(token.start >= said_until for token in tokens) if told.end else 0
    if example.running_text:  # a token on both sides is the beginning's, the last one the target's
        target_start = min(target_start, len(tokens) - n_end - 1)
    if target_start == len(tokens) - n_end:
        raise InputError(f"target {example.target!r} makes no token: write out what must follow")
    if target_start == 0:
        raise InputError(f"prompt {example.prompt!r} makes no token: give a longer one, or a BOS token")
    _check_known(model, text, tokens[target_start:])
    if (limit := model.context_length) is not None and len(tokens) > limit:
        said = f"{len(tokens)} tokens, but the context of {model.name} holds {limit}"
        raise InputError(f"{said}: shorten the prompt {example.prompt[:40]!r}…")
    subject = None
    if isinstance(example, Fact) and (span := example.subject_span) is not None:
        start, end = (at + told.shift for at in span)
        if text[max(start, 0) : end] != example.subject:
            raise InputError(
                f"the chat template does not write the subject {example.subject!r} as it is given"
            )
        subject = _covering(tokens[:target_start], start, end)
    return Encoded(
        ids=tuple(token.id for token in tokens),
        target_start=target_start,
        subject=subject,
        tokens=_shown(text, tokens),
        n_end=n_end,
    )


def _tokenize(model: Model, text: str) -> list[_Token]:
    tokenizer = model.tokenizer
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {model.name} gives no offsets: a fast one (tokenizer.json) is needed"
        )
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids = encoding["input_ids"]
    model.check_embedded(max(ids, default=0))
    names = tokenizer.convert_ids_to_tokens(ids)
    spans = encoding["offset_mapping"]
    return [
        _Token(id, name, *_untrimmed(text, name, *span))
        for id, name, span in zip(ids, names, spans, strict=True)
    ]


def _untrimmed(text: str, name: str, start: int, end: int) -> tuple[int, int]:
    """Give back the spaces that byte-level BPE, unless told otherwise, trims off the offsets of "Ġis"."""
    n_spaces = len(name) - len(name.lstrip("Ġ"))
    trimmed = start == end or text[start] != " "
    before = start - n_spaces
    if n_spaces and trimmed and before >= 0 and text[before:start] == " " * n_spaces:
        return before, end
    return start, end


def _bos(model: Model, tokens: list[_Token]) -> _Token | None:
    """The BOS token to put in front, unless there is none or the text brings its own."""
    if model.bos is None or (tokens and tokens[0].id == model.bos):
        return None
    name = model.tokenizer.convert_ids_to_tokens(model.bos)
    return _Token(model.bos, str(name), -1, -1)


def _covering(tokens: list[_Token], start: int, end: int) -> tuple[int, int]:
    """Range of the tokens that share a character with text[start:end]."""
    inside = [index for index, token in enumerate(tokens) if token.start < end and token.end > start]
    first, last = inside[0], inside[-1]
    while first < last and tokens[first].is_mark:  # SentencePiece's space before a text that has none
        first += 1
    return first, last + 1


def _shown(text: str, tokens: list[_Token]) -> tuple[str, ...]:
    """The part of the text that each token adds; together they are the text."""
    shown, done = [], 0
    for token in tokens:
        if token.start < 0:
            shown.append(token.name)
        elif token.is_mark and not text[token.start : token.end].isspace():
            shown.append("")
        else:
            shown.append(text[done : token.end] or _SECOND_BYTE)
            done = max(done, token.end)
    return tuple(shown)


def _check_known(model: Model, text: str, target: list[_Token]) -> None:
    unknown, name = model.tokenizer.unk_token_id, model.tokenizer.unk_token
    for token in target:
        piece = text[token.start : token.end]
        if token.id == unknown and name not in piece:
            raise InputError(
                f"the tokenizer of {model.name} does not know {piece!r} in the target: reword it"
            )


def _straddles(piece: str, prompt: str, target: str) -> str:
    said = (
        f"token {piece!r} covers the end of prompt {prompt[-20:]!r} and the start of target {target[:20]!r}"
    )
    if prompt[-1].isspace():
        return f"{said}: move the space to the target, {' ' + target[:20]!r}"
    if not target[0].isspace() and not is_spaceless(target[0]):
        return f"{said}: begin the target with a space, {' ' + target[:20]!r}, or move {piece!r} to one side"
    return f"{said}: move {piece!r} as a whole to one side"
