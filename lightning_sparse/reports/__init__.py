"""What the user sees: the table of targets before training, the summary after it."""

from lightning_sparse.reports.report import Report, Row
from lightning_sparse.reports.show import show_report, show_targets

__all__ = ["Report", "Row", "show_report", "show_targets"]
