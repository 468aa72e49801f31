"""What the user sees: tables before and after training, and what was recorded of a run as pages and pictures."""

from lightning_sparse.reports.html import write_report
from lightning_sparse.reports.report import Report, Row
from lightning_sparse.reports.runs import Run, read_run
from lightning_sparse.reports.show import show_report, show_targets

__all__ = ["Report", "Row", "Run", "read_run", "show_report", "show_targets", "write_report"]
