"""The page about runs, in a real browser: all charts are drawn, nothing is asked of a network, nothing is cut off."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from lightning_sparse.reports import Run, write_report
from lightning_sparse.reports.charts import Bars, Heat, Lines, best, comparison, direction, of_run, shorten
from lightning_sparse.reports.html import _literal
from tests.helpers.recorded import make_run

HOSTILE = "</script><img src=x onerror=document.title='broken'>$\\frac$&\"'`%{y}"
LONG = [f"model.backbone.layers.{i}.attention.self.query_projection.weight" for i in range(30)]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--allow-file-access-from-files",
    "--virtual-time-budget=20000",
]
# Shows the page as wide as a desktop and as a phone, and measures both.
FRAMES = """
<!DOCTYPE html><body><iframe src="report.html" style="width:1280px;height:900px"></iframe>
<iframe src="report.html" style="width:390px;height:900px"></iframe><pre id="found"></pre><script>
setTimeout(() => {
  const measure = frame => {
    const page = frame.contentDocument, root = page.documentElement, box = e => e.getBoundingClientRect();
    return {
      title: page.title, width: root.clientWidth, scroll: root.scrollWidth,
      charts: page.querySelectorAll("figure > div").length,
      drawn: [...page.querySelectorAll("figure > div")].filter(div => div.querySelector(
          "svg.main-svg .js-line, svg.main-svg .barlayer path, svg.main-svg .heatmaplayer image")).length,
      right: Math.max(...[...page.querySelectorAll("figure, svg, td")].map(element => box(element).right)),
      labels: Math.max(...[...page.querySelectorAll(".ytick text")].map(text => box(text).width)),
    };
  };
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
}, 8000);
</script></body>
"""


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None and os.environ.get("CI") != "true":
        pytest.skip("there is no Chromium")
    assert found, "CI has to install Chromium"
    return found


def browse(chromium, page):
    """The page as the browser leaves it, and what it says on its console."""
    command = [
        chromium,
        *FLAGS,
        f"--user-data-dir={Path('profile').absolute()}",
        "--dump-dom",
        page.absolute().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture
def pair():
    names = [*LONG, HOSTILE]
    metrics = {HOSTILE + "_accuracy": 1.0, "lr": 0.1}
    first = make_run(Path("ST-3.jsonl"), names, metrics=metrics)
    second = make_run(Path("RigL.jsonl"), names, seed=1, method=HOSTILE)
    return [first, Run(HOSTILE, second.methods, second.weights, second.records)]


def test_a_browser_shows_all_charts_of_two_runs(chromium, pair):
    write_report(pair, "report.html")
    Path("frames.html").write_text(FRAMES)
    dom, console = browse(chromium, Path("frames.html"))
    assert console == []
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    charts = len(comparison(pair)) + sum(len(of_run(run)) for run in pair)
    for frame, width in zip(found, (1280, 390), strict=True):
        assert frame["charts"] == frame["drawn"] == charts == 19
        assert frame["scroll"] <= frame["width"] <= width  # no horizontal scrolling
        assert frame["right"] <= width
        assert 20 < frame["labels"] < 130
        assert frame["title"] == f"ST-3 and {HOSTILE}"


def test_the_page_asks_nothing_of_a_network():
    page = write_report(make_run(Path("run.jsonl"), LONG), "report.html").read_text("utf-8")
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page)
    assert not re.search(r"https?:|//[a-z]|\b(src|href)=|@import|url\(", own)
    # The browser itself is told to refuse, plotly.js included.
    assert "http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline';" in own


def test_names_cannot_break_out_of_the_page(pair):
    own = write_report(pair, "report.html").read_text("utf-8")
    assert HOSTILE not in own
    assert "<img" not in own.partition("</head>")[2]
    assert _literal({HOSTILE: [HOSTILE, float("nan")]}).count("<") == 0
    assert json.loads(_literal({HOSTILE: [HOSTILE, float("nan")]})) == {HOSTILE: [HOSTILE, None]}
    assert own.count("<script>") == own.count("</script>") == 2


def test_the_table_tells_what_the_runs_were(pair):
    page = write_report(pair, "report.html").read_text("utf-8")
    rows = dict(re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", page.replace("<wbr>", ""))[1:])
    cells = {title: [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for title, row in rows.items()}
    assert cells["method"] == ["ST3", HOSTILE]
    assert cells["arguments"] == ["sparsity=0.9", "sparsity=0.9"]
    assert cells["epochs"] == ["12 (120 steps)"] * 2
    assert cells["sparsity"][0] == f"{pair[0].total_sparsity[12]:.2%}"
    assert cells["val_loss"][0] == "0.1538, best 0.1538 (epoch 12)"
    assert cells["training FLOPs"] if "training FLOPs" in cells else "flops/training_ratio" not in pair[0].metrics


def test_charts_hold_the_numbers_of_the_run(pair):
    run = pair[0]
    charts = {chart.key: chart for chart in of_run(run)}
    assert set(charts) == {
        *("sparsity-of-layers", "thresholds", "flops-inference", "flops-training"),
        *("mask-overlap", "dropped-and-grown", "dead-outputs"),
    }
    heat = charts["sparsity-of-layers"]
    assert isinstance(heat, Heat)
    assert heat.values[3, 5] == run.records[5]["zeros"][3] / 288
    for key, factor, column in (
        ("flops-inference", 1, 1 - run.sparsity[-1]),
        ("flops-training", 3, run.table("training")[-1]),
    ):
        bars = charts[key]
        assert isinstance(bars, Bars)
        assert bars.rows == [*run.names, "(no weight)"]
        dense, sparse = bars.groups.values()
        assert dense == [factor * flops for flops in run.flops.values()]
        assert sparse == pytest.approx(
            [*(share * flops for share, flops in zip(column, dense, strict=False)), dense[-1]]
        )
    overlap = charts["mask-overlap"]
    assert isinstance(overlap, Lines)
    masks = [run.masks(epoch) for epoch in (6, 7)]
    both = sum(int((masks[0][name] & masks[1][name]).sum()) for name in run.names)
    either = sum(int((masks[0][name] | masks[1][name]).sum()) for name in run.names)
    assert overlap.lines[-1].points[7] == pytest.approx(both / either)
    assert charts["dead-outputs"].note.startswith("Outputs that no weight reaches any more: ")


def test_agreement_of_equal_runs_is_complete_and_of_random_ones_chance(pair):
    one, other = pair
    alike = {chart.key: chart for chart in comparison([one, Run("again", one.methods, one.weights, one.records)])}
    assert set(alike["masks-compared"].groups["found"]) == {1.0}
    apart = {chart.key: chart for chart in comparison([one, other])}["masks-compared"].groups
    assert sum(apart["found"]) == pytest.approx(sum(apart["chance"]), rel=0.2)


def test_runs_of_one_epoch_dense_ones_and_unlike_ones_are_shown(pair):
    short = Run("short", pair[0].methods, pair[0].weights, pair[0].records[:1])
    dense = Run("dense", [], [], [{"epoch": 1, "step": 3, "metrics": {"val_loss": float("nan")}}])
    bare = make_run(Path("bare.jsonl"), ["other.weight"], masks=False)
    assert write_report([short, dense, bare, bare], "report.html").exists()
    [method] = short.methods  # runs of one name are told apart by their methods, and these by numbers
    assert f"{method['name']} (3)" in Path("report.html").read_text()


def test_pictures_are_the_same_charts():
    few = [make_run(Path(f"{name}.jsonl"), [LONG[0], HOSTILE], seed=i) for i, name in enumerate(["$\\frac$", "x" * 90])]
    write_report(few, "report.html", pictures="pictures")
    files = sorted(Path("pictures").iterdir())
    assert len(files) == 19
    for file in files:
        with Image.open(file) as picture:
            assert picture.width == 1280
            assert len(picture.convert("L").getcolors()) > 20


def test_runs_that_are_no_runs_are_refused():
    with pytest.raises(
        ValueError, match=r"^Expected argument `runs` to be runs of which something was recorded, but got"
    ):
        write_report([], "report.html")
    with pytest.raises(FileNotFoundError):
        write_report("nowhere.jsonl", "report.html")
    assert not Path("report.html").exists()


def test_best_is_sought_among_moments_as_sparse_as_the_last():
    weights = [{"name": "w", "shape": [10], "outputs": 10}]
    points = [(1, 0, 0.99), (2, 9, 0.7), (3, 9, 0.8), (4, 9, 0.75)]
    records = [{"epoch": epoch, "zeros": [zeros], "metrics": {"acc": value}} for epoch, zeros, value in points]
    assert best(Run("x", [], weights, records), "acc") == (3, 0.8)
    assert best(Run("x", [], [], records), "acc") == (1, 0.99)
    assert [direction(name) for name in ("val_acc", "train/loss", "top5_error", "lr", "f1")] == [1, -1, -1, 0, 1]


def test_short_names_tell_layers_apart():
    assert shorten(["net.0.weight", "net.10.weight"]) == ["0", "10"]
    assert shorten(["fc.weight"]) == ["fc"]
    bert = [f"bert.encoder.layer.{i}.{part}.weight" for i in range(12) for part in ("attention.self.query", "mlp.out")]
    assert len(set(shorten(bert))) == len(bert)
    assert len(set(shorten(LONG))) == len(LONG)
    assert max(map(len, shorten(LONG))) <= 18
