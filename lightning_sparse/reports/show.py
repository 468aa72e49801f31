"""Tables in the terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table

from lightning_sparse.flops import readable
from lightning_sparse.reports.report import PER_LAYER, Report, Row

__all__ = ["show_report", "show_targets"]


def show_targets(method: str, rows: Sequence[Row]) -> None:
    """Print, for each weight, whether it is treated and why; vectors (biases, norms) share a line."""
    console = _make_console()
    table = Table(title=f"{method}: what is made sparse", title_justify="left")
    # Where names need no more than half of the width, let the reasons be folded before them.
    names_fit = 2 * max((len(row.name) for row in rows), default=0) <= console.width
    for title in ("weight", "shape", "sparse", "kind, or why not"):
        table.add_column(title, overflow="fold", no_wrap=title == "weight" and names_fit)
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
    console.print(table)
    console.print(f"{readable(treated)} of {readable(total)} parameters are made sparse.\n")


def show_report(report: Report, monitored: Mapping[str, float]) -> None:
    """Print sparsity, threshold and theoretical FLOPs of each treated weight, and the totals."""
    table = Table(title=f"{report.method}: the trained model", title_justify="left")
    for title in report.header():
        justify: JustifyMethod = "left" if title in ("weight", "shape") else "right"
        table.add_column(title.replace(" ", "\n"), overflow="fold", justify=justify)  # leaves more width for names
    for cells in report.cells():
        table.add_row(*cells)
    console = _make_console()
    console.print(table)
    for key, value in {**report.totals, **monitored}.items():
        if not key.startswith(PER_LAYER):
            console.print(f"{key:<24} {readable(value) if value >= 1000 else f'{value:.4g}'}", highlight=False)
    if "flops/inference" in report.totals:
        uncounted = ", ".join(sorted(report.uncounted)) or "nothing"
        console.print(f"FLOPs are theoretical multiply-accumulates per sample; not counted: {uncounted}")


def _make_console() -> Console:
    """Take names literally, and fold lines in a terminal only: in a log file a name must stay in one piece."""
    console = Console(markup=False, emoji=False)
    if not (console.is_terminal or console.is_jupyter):
        console.width = 1000
    return console
