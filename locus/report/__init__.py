"""What a person looks at: pages without network, plots, a table for the terminal."""

from locus.report.attribution_plot import plot_attribution
from locus.report.audit_report import audit_report, compare_report, terminal_table
from locus.report.lens_plot import plot_lens
from locus.report.locate_report import locate_report
from locus.report.strength_plot import plot_strength
from locus.report.trace_report import plot_trace, trace_report

__all__ = [
    "audit_report",
    "compare_report",
    "locate_report",
    "plot_attribution",
    "plot_lens",
    "plot_strength",
    "plot_trace",
    "terminal_table",
    "trace_report",
]
