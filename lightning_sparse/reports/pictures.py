"""Charts as PNG files."""

import textwrap
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sparse.reports.charts import Bars, Chart, Heat, Lines, cut, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart, 1280 pixels wide.

    Args:
        chart: What to draw.
        path: The PNG file.

    Raises:
        ModuleNotFoundError: If matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pictures need a package: pip install 'lightning-sparse[report]'.") from error
    rows = len(chart.rows) if isinstance(chart, Heat | Bars) else 0
    with rc_context({"text.parse_math": False}):  # names are taken literally
        figure = Figure(figsize=(8, max(4.0, 1.5 + 0.2 * rows)), layout="constrained")
        axes = figure.subplots()
        _fill(chart, axes)
        figure.suptitle(textwrap.fill(chart.title, 75), x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes.set_title(textwrap.fill(chart.note, 95), loc="left", fontsize=9, color="#57606a")
        axes.set_xlabel(chart.x)
        axis = axes.xaxis if isinstance(chart, Bars) else axes.yaxis
        if not isinstance(chart, Bars):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if chart.percent and not isinstance(chart, Heat):
            axis.set_major_formatter(PercentFormatter(1.0))
        elif isinstance(chart, Bars):
            axis.set_major_formatter(EngFormatter(sep=" "))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)


@singledispatch
def _fill(chart: Chart, axes: "Axes") -> None:
    raise NotImplementedError


@_fill.register(Lines)
def _(chart: Lines, axes: "Axes") -> None:
    for line in chart.lines:
        axes.plot(
            list(line.points),
            list(line.points.values()),
            color=line.color,
            label=None if line.minor else cut(line.name),
            linestyle="--" if line.dashed else "-",
            linewidth=0.8 if line.minor else 2,
            marker=None if line.minor or len(line.points) > 40 else "o",
            markersize=4,
        )
    _plain(axes, legend=len(chart.lines) > 1 and not all(line.minor for line in chart.lines))


@_fill.register(Heat)
def _(chart: Heat, axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    edges = (chart.columns[0] - 0.5, chart.columns[-1] + 0.5, len(chart.rows) - 0.5, -0.5)
    image = axes.imshow(chart.values, aspect="auto", extent=edges, vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(chart.rows)), shorten(chart.rows, 30), fontsize=8)
    axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1.0), pad=0.01)


@_fill.register(Bars)
def _(chart: Bars, axes: "Axes") -> None:
    number = 1 if chart.behind else len(chart.groups)
    for i, ((name, values), color) in enumerate(zip(chart.groups.items(), chart.colors, strict=True)):
        place = 0 if chart.behind else i
        rows = [row + (place - (number - 1) / 2) * 0.8 / number for row in range(len(chart.rows))]
        axes.barh(rows, values, 0.8 / number, color=color, label=cut(name), alpha=0.45 if chart.behind and not i else 1)
    axes.set_yticks(range(len(chart.rows)), shorten(chart.rows, 30), fontsize=8)
    axes.invert_yaxis()
    _plain(axes, legend=True)


def _plain(axes: "Axes", *, legend: bool) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if legend:
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)
