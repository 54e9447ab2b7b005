"""Did it really go, and what else went: one set of questions and attacks for the base, the edits and the controls."""

from locus.audit.intervals import Interval, Items
from locus.audit.measurement import Measurement
from locus.audit.metric_table import FIGURES, Figure
from locus.audit.run import Audit, ask_about, audit, measure_model, read_audit
from locus.audit.settings import AuditSettings, RelearnAttack, Standards
from locus.audit.state import State
from locus.audit.verdicts.verdict import Verdict

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
