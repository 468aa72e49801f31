"""A page about recorded runs, which needs nothing but a browser."""

import html
import json
import re
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from lightning_sparse.flops import readable
from lightning_sparse.reports.charts import (
    COLORS,
    Bars,
    Chart,
    Heat,
    Lines,
    best,
    comparison,
    cut,
    direction,
    of_run,
    shorten,
)
from lightning_sparse.reports.pictures import draw
from lightning_sparse.reports.runs import Run, read_run

__all__ = ["write_report"]

Figure = dict[str, Any]

# Even the browser is told that nothing may be asked of any network.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_NOTE = "FLOPs are theoretical: they say how much a sparse kernel could skip, not how fast it is."
_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --card: #f6f7f9; --text: #1f2328; --soft: #57606a;
        --line: #d0d7de }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181d; --card: #1e2228; --text: #e6e8eb; --soft: #a3abb5; --line: #3a414a }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--ground); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem }
h2 { font-size: 1.25rem; margin: 2rem 0 .75rem }
h3 { font-size: 1rem; margin: 0 }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .5rem; border-top: 1px solid var(--line) }
thead th { border-top: none }
th { font-weight: 600 }
th:first-child { width: min(34%, 12rem) }
tbody th { color: var(--soft); font-weight: 400 }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: 8px; min-width: 0 }
.charts { columns: 30rem 2; column-gap: 1rem }
.charts figure { break-inside: avoid; margin-bottom: 1rem }
figcaption { color: var(--soft); font-size: .85rem; min-height: 1.3em }
@media (max-width: 600px) {
  body { padding: .5rem }
  table { font-size: .8rem }
  th, td { padding: .3rem .2rem }
  th:first-child { width: 26% }
}
footer { color: var(--soft); font-size: .85rem; margin-top: 2rem }
"""
_SCRIPT = """
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const touch = matchMedia("(pointer: coarse)").matches;
function colours() {
  const axis = {gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line")};
  return {paper_bgcolor: style("--card"), plot_bgcolor: style("--card"), font: {color: style("--text"), size: 12},
          xaxis: axis, yaxis: axis};
}
for (const [id, figure] of Object.entries(FIGURES)) {
  const layout = {...figure.layout, ...colours()};
  for (const axis of ["xaxis", "yaxis"]) layout[axis] = {...figure.layout[axis], ...colours()[axis]};
  if (touch) layout.dragmode = false;  // a finger scrolls the page
  Plotly.newPlot(id, figure.data, layout, {displaylogo: false, displayModeBar: false});
  new ResizeObserver(() => Plotly.Plots.resize(id)).observe(document.getElementById(id));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  const {xaxis, yaxis, font, ...ground} = colours();
  const change = {...ground, "font.color": font.color};
  for (const [key, value] of Object.entries(xaxis)) change["xaxis." + key] = change["yaxis." + key] = value;
  for (const id of Object.keys(FIGURES)) Plotly.relayout(id, change);
});
"""


def write_report(
    runs: str | Path | Run | Sequence[str | Path | Run],
    path: str | Path,
    *,
    pictures: str | Path | None = None,
) -> Path:
    """Show recorded runs on one page with interactive charts, which needs no network.

    Args:
        runs: What :class:`~lightning_sparse.RunRecorder` has written, or has been read from it: one run, or several
            to compare.
        path: The page, an HTML file of about 5 MB, most of which is plotly.js.
        pictures: Folder for the same charts as PNG files; None for none.

    Returns:
        The page.

    Raises:
        ModuleNotFoundError: If plotly, or for pictures matplotlib, is missing.
        ValueError: If a file is no record of a run, or nothing has been recorded.

    Example:
        >>> run = Run("dense", [], [], [{"epoch": i, "metrics": {"val_loss": 1 / (i + 1)}} for i in range(3)])
        >>> write_report(run, "report.html").stat().st_size > 1e6
        True
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Reports need a package: pip install 'lightning-sparse[report]'.") from error
    found = [runs] if isinstance(runs, str | Path | Run) else list(runs)
    all_runs = _distinct([run if isinstance(run, Run) else read_run(run) for run in found])
    if not all_runs or not all(run.records for run in all_runs):
        empty = [run.name for run in all_runs if not run.records]
        raise ValueError(f"Expected argument `runs` to be runs of which something was recorded, but got {empty}.")
    figures: dict[str, Figure] = {}
    body = [f"<h1>{_escape(' and '.join(run.name for run in all_runs))}</h1>", _summary(all_runs)]
    sections = [("Over time" if len(all_runs) == 1 else "The runs beside each other", comparison(all_runs))]
    sections += [(run.name, of_run(run, COLORS[i % len(COLORS)])) for i, run in enumerate(all_runs)]
    for number, (title, charts) in enumerate(sections):
        if charts:
            body.append(f'<section><h2>{_escape(title)}</h2><div class="charts">')
            for chart in charts:
                key = f"chart-{number}-{chart.key}"
                figures[key] = {"data": [], **_figure(chart)}
                body.append(_card(key, chart))
                if pictures is not None:
                    draw(chart, Path(pictures, _file(title if number else "", chart)))
            body.append("</div></section>")
    body.append(f"<footer>{_NOTE}</footer>")
    page = "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escape(' and '.join(run.name for run in all_runs))}</title><style>{_STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body>",
            *body,
            f"<script>const FIGURES = {_literal(figures)};{_SCRIPT}</script></body></html>",
        ]
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of the same name are told apart by their methods, or else by numbers."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [" + ".join(method["name"] for method in run.methods) or "dense" for run in runs]
    numbered = [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    return [Run(name, run.methods, run.weights, run.records) for name, run in zip(numbered, runs, strict=True)]


def _escape(text: object) -> str:
    return html.escape(str(text))


def _literally(name: str) -> str:
    """A name as plotly.js takes it, which knows few entities."""
    return html.escape(name, quote=False)


def _breakable(text: str) -> str:
    """Text that may be folded where words in code end."""
    return re.sub(r"([_=/.])(?=[A-Za-z])", r"\1<wbr>", _escape(text))


def _literal(value: Any) -> str:
    """A value as JavaScript that no name in it can break out of."""
    text = json.dumps(_finite(value), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _file(title: str, chart: Chart) -> str:
    safe = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in title).strip(".")
    return f"{safe}-{chart.key}.png" if safe else f"{chart.key}.png"


def _card(key: str, chart: Chart) -> str:
    texts = f"<h3>{_escape(chart.title)}</h3><figcaption>{_escape(chart.note)}</figcaption>"
    return f'<figure>{texts}<div id="{key}" style="height:{_height(chart)}px"></div></figure>'


def _height(chart: Chart) -> int:
    if isinstance(chart, Lines):
        return 320
    rows = len(chart.rows) if isinstance(chart, Heat | Bars) else 0
    groups = len(chart.groups) if isinstance(chart, Bars) and not chart.behind else 1
    return max(320, 90 + (22 if rows <= 40 else 15) * rows * max(1, groups - 1))


# -- the table --------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run]) -> str:
    rows: dict[str, list[str]] = {
        "method": [", ".join(method["name"] for method in run.methods) or "dense training" for run in runs],
        "arguments": [_arguments(run) for run in runs],
        "epochs": [f"{run.epochs[-1]} ({run.records[-1].get('step', 0):,} steps)" for run in runs],
        "weights under control": [readable(sum(run.sizes)) for run in runs],
        "sparsity": [_percent(run.total_sparsity.get(run.epochs[-1])) for run in runs],
        "inference FLOPs": [_percent(run.records[-1]["metrics"].get("flops/inference_ratio")) for run in runs],
        "training FLOPs": [_percent(run.records[-1]["metrics"].get("flops/training_ratio")) for run in runs],
    }
    metrics = {metric: None for run in runs for metric in run.metrics if direction(metric) and "/target" not in metric}
    for metric in metrics:
        rows[metric] = [_measured(run, metric) for run in runs]
    head = "".join(
        f'<th><span class="swatch" style="background:{COLORS[i % len(COLORS)]}"></span>{_escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    lines = [
        f"<tr><th>{_breakable(title)}</th>{''.join(f'<td>{_breakable(cell)}</td>' for cell in cells)}</tr>"
        for title, cells in rows.items()
        if any(cell != "–" for cell in cells)
    ]
    note = "Best: among the epochs that are as sparse as the last one. FLOPs: of the dense model's."
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<figure>{table}<figcaption>{note}</figcaption></figure>"


def _arguments(run: Run) -> str:
    hidden = ("verbose", "log_layers")
    given = [
        f"{key}={value}"
        for method in run.methods
        for key, value in method["arguments"].items()
        if key not in hidden and value is not None
    ]
    return ", ".join(given) or "–"


def _measured(run: Run, metric: str) -> str:
    curve, found = run.curve(metric), best(run, metric)
    if not curve:
        return "–"
    last = list(curve.values())[-1]
    return f"{last:.4g}" + (f", best {found[1]:.4g} (epoch {found[0]})" if found else "")


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.2%}"


# -- charts as plotly.js takes them -----------------------------------------------------------------------------------


@singledispatch
def _figure(chart: Chart) -> Figure:
    raise NotImplementedError


@_figure.register
def _(chart: Lines) -> Figure:
    value = "%{y:.2%}" if chart.percent else "%{y:.4g}"
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(line.points) > 40 or line.minor else "lines+markers",
            "name": _literally(cut(line.name)),
            "meta": _literally(line.name),
            "x": list(line.points),
            "y": list(line.points.values()),
            "line": {
                "color": line.color,
                "width": 1 if line.minor else 2.5,
                "dash": "dash" if line.dashed else "solid",
            },
            "marker": {"size": 5},
            "showlegend": not line.minor,
            "hovertemplate": f"%{{meta}}<br>epoch %{{x}}: {value}<extra></extra>",
        }
        for line in chart.lines
    ]
    return {"data": data, "layout": _layout(chart, {"title": chart.x}, _values(chart))}


@_figure.register
def _(chart: Heat) -> Figure:
    data = {
        "type": "heatmap",
        "z": chart.values.tolist(),
        "x": list(chart.columns),
        "y": list(range(len(chart.rows))),
        "customdata": [[_literally(name)] * len(chart.columns) for name in chart.rows],
        "colorscale": "Viridis",
        "zmin": 0,
        "zmax": 1 if chart.percent else None,
        "hovertemplate": "%{customdata}<br>epoch %{x}: %{z:.2%}<extra></extra>",
        "colorbar": {"tickformat": ".0%", "thickness": 10, "outlinewidth": 0, "xpad": 4},
    }
    return {"data": [data], "layout": _layout(chart, {"title": chart.x, "showgrid": False}, _rows(chart.rows))}


@_figure.register
def _(chart: Bars) -> Figure:
    value = "%{x:.2%}" if chart.percent else "%{x:.3s}"
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _literally(cut(name)),
            "meta": _literally(name),
            "x": list(values),
            "y": list(range(len(chart.rows))),
            "customdata": [_literally(name) for name in chart.rows],
            "marker": {"color": color, "opacity": 0.45 if chart.behind and color == chart.colors[0] else 1},
            "hovertemplate": f"%{{customdata}}<br>%{{meta}}: {value}<extra></extra>",
        }
        for (name, values), color in zip(chart.groups.items(), chart.colors, strict=True)
    ]
    layout = _layout(chart, {"title": chart.x, **_values(chart)}, {**_rows(chart.rows), "showgrid": False})
    return {"data": data, "layout": {**layout, "barmode": "overlay" if chart.behind else "group", "bargap": 0.25}}


def _values(chart: Chart) -> Figure:
    return {"tickformat": ".0%" if chart.percent else "~s" if isinstance(chart, Bars) else "~g", "rangemode": "normal"}


def _rows(names: Sequence[str]) -> Figure:
    size = 11 if len(names) <= 40 else 9
    ticks = {"tickvals": list(range(len(names))), "ticktext": [_literally(name) for name in shorten(names)]}
    return {"autorange": "reversed", "automargin": True, "showgrid": False, "tickfont": {"size": size}, **ticks}


def _layout(chart: Chart, x: Figure, y: Figure) -> Figure:
    titled = {**x, "title": {"text": x["title"], "standoff": 8}, "automargin": True}
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return {
        "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
        "xaxis": titled,
        "yaxis": {"automargin": True, **y},
        "legend": legend,
        "hovermode": "closest",
        "showlegend": isinstance(chart, Bars) or (isinstance(chart, Lines) and len(chart.lines) > 1),
    }
