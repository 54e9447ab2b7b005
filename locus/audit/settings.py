"""What an audit measures, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from locus.audit.relearn import RelearnAttack
from locus.audit.rounding import FORMATS, Format
from locus.audit.verdict import Standards
from locus.errors import InputError
from locus.metrics import ExtractionMode, TruthRatioMode

DEFAULT_ATTACKS = ("lens", "relearn", "rounding", "prompts", "dose")


@dataclass(frozen=True)
class AuditSettings:
    """What is measured and how."""

    attacks: tuple[str, ...] = DEFAULT_ATTACKS
    """Attacks by name, see `locus.audit.attacks`; "all" is every one, "none" is none."""
    control_attacks: tuple[str, ...] = ("lens", "relearn", "rounding")
    """Those of them that the controls go through as well, so that the edit can be compared with random masks there."""
    lens_k: tuple[int, ...] = (4, 10)
    """Sizes of the top and bottom of each layer that the lens curves count."""
    relearn: RelearnAttack = field(default_factory=RelearnAttack)
    """How the relearning attacker trains."""
    rounding: tuple[Format, ...] = FORMATS
    """Weight formats to round to."""
    dose: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Strengths of the edit, 1 being the edit itself, at which the dose curve is taken besides 0 and 1."""
    truth_ratio: TruthRatioMode = "locus"
    """Whose truth ratio TOFU's figures use: locus, tofu-original, openunlearning, tofu-paper."""
    extraction: ExtractionMode = "locus"
    """Whose extraction strength: locus, openunlearning."""
    text_block: int = 256
    """Longest piece of neutral text, in tokens."""
    text_tokens: int = 2048
    """Neutral text is read up to about so many tokens; whole paragraphs, spread over what was given."""
    max_tokens: int | None = None
    """Batch size in tokens; None is 512 on a CPU (texts of one length share a batch: little padding), else 8192."""
    max_bytes: int = 1 << 30
    """Memory for the base's log-probabilities on neutral text."""
    standards: Standards = field(default_factory=Standards)
    """The lines between the verdicts."""

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.lens_k) or self.text_block < 2 or (self.max_tokens or 1) < 1:
            raise InputError("audit: lens_k and max_tokens must be at least 1, text_block at least 2")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)
