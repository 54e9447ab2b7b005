"""What an attack is given beside the state it attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from locus.audit.answers import Questions
from locus.audit.settings import AuditSettings
from locus.audit.state import State
from locus.fact import Fact


@dataclass(frozen=True)
class Context:
    """The audit around one attack."""

    base: State
    facts: Sequence[Fact]
    """What had to go."""
    retain: Sequence[Fact]
    """What had to stay: attackers may train on those that are not held out."""
    questions: Mapping[str, Questions]
    settings: AuditSettings = field(default_factory=AuditSettings)
    max_new_tokens: int = 24
    seed: int = 0
    never_knew: State | None = None
    """A model retrained without the forget set, where there is one."""

    @property
    def max_tokens(self) -> int:
        """Batch size in tokens."""
        return self.settings.max_tokens
