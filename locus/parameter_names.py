"""One tensor, two names: what a model calls a parameter and what its checkpoint calls it.

Checkpoints of a bare base model (the hub's gpt2) lack the prefix that the causal language model puts before
it; tied checkpoints store the token embedding and no output head.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from locus.errors import InputError

PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "model.decoder.",
    "base_model.",
    "transformer.",
    "gpt_neox.",
    "backbone.",
    "decoder.",
    "model.",
)
"""What a causal language model may put before the names of its base model; longer ones first."""
_HEAD, _OLD_HEAD = "lm_head.", "embed_out."  # GPT-NeoX checkpoints keep the old name, the model has the new
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)


def canonical(name: str) -> str:
    """The name without the base model's prefix: the same for every way of storing a tensor."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    bare = name.removeprefix(prefix)
    return _HEAD + bare.removeprefix(_OLD_HEAD) if bare.startswith(_OLD_HEAD) else bare


def is_head(name: str) -> bool:
    """Whether this is the output projection onto the vocabulary."""
    return canonical(name) == f"{_HEAD}weight"


def is_embedding(name: str) -> bool:
    """Whether this is the token embedding."""
    return canonical(name) in _EMBEDDINGS


def resolve(name: str, available: Collection[str], where: str) -> str:
    """Find the name under which `available` holds the tensor `name`.

    In this order: the very name; the name with another prefix or none; for an output head that is not there,
    the token embedding it is tied to (and the other way round).

    Args:
        name: A parameter's name, or a checkpoint's.
        available: The names to choose from.
        where: What holds them, for the message.

    Raises:
        InputError: none matches, or more than one does.
    """
    if name in available:
        return name
    wanted = canonical(name)
    found = [other for other in available if canonical(other) == wanted]
    if not found and is_head(name):
        found = [other for other in available if is_embedding(other)]
    elif not found and is_embedding(name):
        found = [other for other in available if is_head(other)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{where}: tensor {name} could be any of {', '.join(sorted(found))}; rename one")
    close = difflib.get_close_matches(name, list(available), n=1, cutoff=0.3)
    hint = f" (nearest: {close[0]})" if close else ""
    raise InputError(f"{where}: holds no tensor {name}{hint}; it belongs to another model")
