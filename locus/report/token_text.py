"""Tokens as a reader can see them in a picture."""

from __future__ import annotations

_SEEN = {"\n": "↵", "\t": "⇥"}


def seen(token: str, longest: int) -> str:
    """A token without invisible characters, cut behind so many.

    Control characters are shown as Python writes them (`\\x17`), nothing but spaces as ␣.
    """
    text = "".join(_SEEN.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token).strip(" ") or "␣"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def plain(text: str) -> str:
    """For matplotlib: a dollar sign is not mathematics."""
    return text.replace("$", r"\$")
