"""Conversations: {"messages": [{"role", "content"}, …]} and ShareGPT's {"conversations": [{"from", "value"}, …]}."""

from __future__ import annotations

from locus.errors import InputError
from locus.readers.records import Record
from locus.readers.translation import asked, translated

_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def chat_messages(record: Record) -> Record:
    """What the user asks and what the model answers, as question and answer.

    A fact is one question: a conversation of several turns, or one with a system message, is refused, since its other
    messages would be dropped.
    """
    name = "messages" if record.fields.get("messages") is not None else "conversations"
    said = []
    for message in record.objects(name):
        keys = ("role", "content") if "role" in message.fields else ("from", "value")
        role = message.text(keys[0])
        said.append((_ROLES.get(role, role), message.text(keys[1])))
    roles = [role for role, _ in said]
    if roles != ["user", "assistant"]:
        raise InputError(
            f"{record.place}: a conversation of {', '.join(roles) or 'nothing'}: a fact is one user message and one "
            "assistant message; split it, and write what the others say into the question"
        )
    return translated(record, asked(said[0][1], said[1][1]))
