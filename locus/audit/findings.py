"""What an audit has measured: plain values, from which the document is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from locus.audit.measurement import Measurement
from locus.audit.questions import Questions
from locus.audit.settings import AuditSettings
from locus.audit.weight_change import WeightChange


@dataclass(frozen=True)
class Findings:
    """Every state measured on the same items."""

    base: Measurement
    edits: tuple[Measurement, ...]
    controls: tuple[Measurement, ...]
    reference: Measurement | None
    """A model retrained without the forget set, where one was given."""
    relations: Mapping[str, str]
    """Fact id -> relation, of the facts that have one."""
    questions: Mapping[str, Questions]
    changes: Mapping[str, WeightChange]
    """What the weights of each edit and control changed, by state."""
    missing: tuple[Mapping[str, str], ...]
    """What was not measured, and why."""
    settings: AuditSettings
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Digests of all that was asked, see `locus.input_digest`: equal ones mean that two audits compare."""
    notes: tuple[str, ...] = ()
    """What a reader must know before the figures: an edit audited in another form than it was made in."""

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        """Base, edits, controls, reference."""
        reference = () if self.reference is None else (self.reference,)
        return (self.base, *self.edits, *self.controls, *reference)
