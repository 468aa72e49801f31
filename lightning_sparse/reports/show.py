"""Tables in the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from lightning_sparse.reports.report import Report, Row, readable

__all__ = ["show_report", "show_targets"]


def show_targets(method: str, rows: Sequence[Row]) -> None:
    """Print, for each weight, whether it is treated and why; vectors (biases, norms) share a line."""
    table = Table(title=f"{method}: what is made sparse", title_justify="left")
    for title in ("weight", "shape", "sparse", "kind, or why not"):
        table.add_column(title, overflow="fold")
    for row in rows:
        if row.treated or len(row.shape) > 1:
            shape = "×".join(map(str, row.shape))
            table.add_row(
                row.name, shape, "yes" if row.treated else "no", row.reason, style=None if row.treated else "dim"
            )
    vectors = [row for row in rows if not row.treated and len(row.shape) <= 1]
    if vectors:
        table.add_row(f"{len(vectors)} vectors", "", "no", "fewer than 2 dimensions", style="dim")
    treated, total = sum(row.numel for row in rows if row.treated), sum(row.numel for row in rows)
    console = Console()
    console.print(table)
    console.print(f"{readable(treated)} of {readable(total)} parameters are made sparse.\n")


def show_report(report: Report, monitored: Mapping[str, float]) -> None:
    """Print sparsity, threshold and theoretical FLOPs of each treated weight, and the totals."""
    table = Table(title=f"{report.method}: the trained model", title_justify="left")
    for title in report.header():
        table.add_column(title, overflow="fold", justify="left" if title in ("weight", "shape") else "right")
    for cells in report.cells():
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for key, value in {**report.totals, **monitored}.items():
        if not key.startswith(("sparsity/layer/", "threshold/")):
            console.print(f"{key:<24} {readable(value) if value >= 1000 else f'{value:.4g}'}", highlight=False)
    if report.uncounted:
        console.print(
            f"FLOPs are theoretical multiply-accumulates per sample; not counted: {', '.join(sorted(report.uncounted))}"
        )
