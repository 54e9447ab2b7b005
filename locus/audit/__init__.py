"""Did it really go, and what else went: one set of questions and attacks for the base, the edits and the controls."""

from locus.audit.examine import Audit, ask_about, audit, measure_model, read_audit
from locus.audit.figure import FIGURES, Figure
from locus.audit.interval import Interval, Items
from locus.audit.measurement import Measurement
from locus.audit.relearn import RelearnAttack
from locus.audit.settings import AuditSettings
from locus.audit.state import State
from locus.audit.verdict import Standards, Verdict

__all__ = [
    "FIGURES",
    "Audit",
    "AuditSettings",
    "Figure",
    "Interval",
    "Items",
    "Measurement",
    "RelearnAttack",
    "Standards",
    "State",
    "Verdict",
    "ask_about",
    "audit",
    "measure_model",
    "read_audit",
]
