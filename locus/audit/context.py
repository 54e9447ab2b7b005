"""What an attack is given beside the state it attacks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from locus.audit.questions import Answers, Questions
from locus.audit.settings import AuditSettings
from locus.audit.state import State
from locus.fact import Fact
from locus.finished_parts import FinishedParts
from locus.model import Model


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
    finished: FinishedParts = field(default_factory=FinishedParts)
    """What an earlier run of the same audit has measured already."""
    never_knew: State | None = None
    """A model retrained without the forget set, where there is one."""
    answers: MutableMapping[str, Mapping[str, Answers]] = field(default_factory=dict)
    """State name -> its answers by kind of question, of the states that were asked before; nobody need ask twice."""

    written: MutableMapping[str, tuple[str, ...]] = field(default_factory=dict)
    """State name -> what it wrote after each forget prompt, of the states that have written already."""

    @property
    def seed(self) -> int:
        """Seed of what an attack draws."""
        return self.settings.seed

    @property
    def max_tokens(self) -> int:
        """Batch size in tokens."""
        return batch_tokens(self.settings, self.base.model)


def batch_tokens(settings: AuditSettings, model: Model) -> int:
    """The settings' batch size, or what suits the model's device."""
    return settings.max_tokens or (512 if model.device.type == "cpu" else 8192)
